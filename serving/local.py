"""Serve a release on this machine: `python -m serving.local`, or `make serve`.

The embedded store (or the one that the environment names), the predictor, the gateway with its page, and a key to call
it with. All ends together: with Ctrl-C, or when one of them ends.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from medforge import apikeys, embedded
from medforge.files import write_atomic
from medforge.lifetime import die_with_parent, stop
from medforge.release.promote import newest_approved, read_keys, trusted_keys
from medforge.release.publish import read_manifest, resolve
from medforge.s3 import is_configured, read_endpoint
from medforge.storage import Store
from serving.gateway.settings import PREFIX

PROJECT = Path(__file__).resolve().parents[1]
REFERENCE = "reference.json"
_LOCAL = "local"  # the name of the key
_READY_SECONDS = 300.0
_STOP_SECONDS = 40.0


@dataclass(frozen=True)
class Child:
    """A process that serves, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])


def main() -> int:
    """Serve until Ctrl-C or SIGTERM. Returns 0 then, 1 when something could not be started or ended by itself."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        serve(arguments)
    except (ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving.local", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--release", default="", help="digest, 6 or more of its characters, or channel; default: the "
                        "release that champion names, or the approved one that was signed last")  # fmt: skip
    parser.add_argument("--candidate", action="store_true", help="what the channel candidate names, approved or not")
    parser.add_argument("--trusted", type=Path, nargs="+", default=[], metavar="FILE.pub",
                        help="reviewers' keys (default: ROOT/reviewers/*.pub)")  # fmt: skip
    parser.add_argument("--bucket", default="medforge", help="bucket of the releases (default medforge)")
    parser.add_argument("--root", type=Path, default=Path(".medforge"), help="embedded store (default .medforge)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the gateway (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="port of the gateway (default 8080)")
    return parser


def serve(arguments: argparse.Namespace) -> None:
    """Start all, tell how to use it, and wait. Raises ValueError when there is nothing to serve or a part ends."""
    root: Path = arguments.root.resolve()
    if _taken(arguments.host, arguments.port):
        raise ValueError(f"port {arguments.port} is taken; choose another: make serve PORT=8090")
    with ExitStack() as stack:
        if not is_configured() and not (root / "store").is_dir():
            raise ValueError(f"there is no store at {root / 'store'}: `make pipeline-run` makes one, with a release")
        environment = dict(os.environ) if is_configured() else stack.enter_context(embedded.serve(root))
        store = Store.from_environment(environment)
        reviewers = root / "reviewers"
        keys = read_keys(arguments.trusted or ([reviewers] if reviewers.is_dir() else []))
        digest = choose(store, arguments, keys)
        prepare(store, arguments.bucket, digest, root)
        port = _free_port()
        predictor = stack.enter_context(
            _running("predictor", _predictor(arguments, digest, port, keys, root), _object_store(environment), root)
        )
        _wait(predictor, f"http://127.0.0.1:{port}/v2/models/medforge/ready", (predictor,))
        gateway = stack.enter_context(
            _running("gateway", [sys.executable, "-m", "serving.gateway"], _gateway(arguments, port, root), root)
        )
        url = f"http://{arguments.host}:{arguments.port}"
        _wait(gateway, f"{url}/readyz", (gateway, predictor))
        _tell(url, digest, arguments.candidate, local_key(root, time.time()), root)
        while True:
            _all_run((gateway, predictor))
            time.sleep(0.5)


def choose(store: Store, arguments: argparse.Namespace, keys: str) -> str:
    """The digest to serve. ValueError says how a release gets approved where none is."""
    bucket = arguments.bucket
    if arguments.candidate or arguments.release:
        return resolve(store, bucket, arguments.release or "candidate")
    if keys and (found := newest_approved(store, bucket, "champion", trusted_keys(keys))):
        return found
    reviewers = arguments.root / "reviewers"
    raise ValueError(
        f"no release in bucket {bucket!r} is approved by a key in {reviewers}. After `make pipeline-run`:\n"
        f"  medforge signing-key {reviewers / 'me'}\n"
        f"  medforge approve candidate --key {reviewers / 'me'} --reviewer 'Your Name'\n"
        "or look at the candidate without approval: make serve CANDIDATE=1"
    )


def prepare(store: Store, bucket: str, digest: str, root: Path) -> None:
    """Put what the gateway needs of the release beside its data: the reference for drift, where the release has one."""
    target = root / "gateway" / REFERENCE
    files = read_manifest(store, bucket, digest)["files"]
    target.unlink(missing_ok=True)
    if REFERENCE in files:
        store.download_files(bucket, f"releases/{digest}", {REFERENCE: files[REFERENCE]}, root / "gateway" / "release")
        write_atomic(target, (root / "gateway" / "release" / REFERENCE).read_bytes())


def local_key(root: Path, now: float) -> str:
    """An API key for this machine's user, which stands in ROOT/gateway/key for its owner's eyes only. One that is still
    valid is used again."""
    from sqlalchemy import create_engine

    folder, secret = root / "gateway", secret_key(root)
    engine = create_engine(f"sqlite:///{folder / 'gateway.db'}")
    try:
        apikeys.create(engine)
        kept = folder / "key"
        if kept.is_file() and (parts := apikeys.parse(kept.read_text().strip())):
            key = apikeys.find(engine, parts[0], now)
            if key and key.state(now) == "valid" and apikeys.matches(key, parts[1], secret):
                return kept.read_text().strip()
        if any(key.name == _LOCAL and key.state(now) == "valid" for key in apikeys.listed(engine)):
            apikeys.revoke(engine, _LOCAL, now)
        _, text = apikeys.add(engine, secret, _LOCAL, now, kind="person", scopes=apikeys.SCOPES)
        kept.unlink(missing_ok=True)
        return _kept(kept, lambda: text)
    finally:
        engine.dispose()


def secret_key(root: Path) -> str:
    """The gateway's secret on this machine, made once."""
    return _kept(root / "gateway" / "secret", lambda: secrets.token_hex(32))


def _kept(path: Path, make: Callable[[], str]) -> str:
    """The secret in a file that only its owner can read; made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(make())
    return path.read_text().strip()


def _predictor(arguments: argparse.Namespace, digest: str, port: int, keys: str, root: Path) -> list[str]:
    trusted = root / "gateway" / "trusted.pub"
    write_atomic(trusted, keys)
    unsigned = ["--allow-unsigned"] if arguments.candidate else []
    return [
        *(sys.executable, "-m", "serving.predictor"),
        *("--model-dir", f"s3://{arguments.bucket}/releases/{digest}/", "--release", digest),
        *("--model-name", "medforge", "--http_port", str(port)),
        *(["--trusted", str(trusted)] if keys else []),
        *unsigned,
    ]


def _object_store(environment: Mapping[str, str]) -> dict[str, str]:
    """The store as kserve_storage is told of it."""
    endpoint, secure = read_endpoint(environment["MEDFORGE_S3_ENDPOINT"], environment.get("MEDFORGE_S3_SECURE", ""))
    return {
        "AWS_ENDPOINT_URL": f"{'https' if secure else 'http'}://{endpoint}",
        "AWS_ACCESS_KEY_ID": environment["MEDFORGE_S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": environment["MEDFORGE_S3_SECRET_KEY"],
        "AWS_DEFAULT_REGION": environment.get("MEDFORGE_S3_REGION") or "us-east-1",
    }


def _gateway(arguments: argparse.Namespace, port: int, root: Path) -> dict[str, str]:
    reference = root / "gateway" / REFERENCE
    settings = {
        "HOST": arguments.host,
        "PORT": str(arguments.port),
        "DATA_DIR": str(root / "gateway"),
        "SECRET_KEY": secret_key(root),
        "STABLE": f"http://127.0.0.1:{port}/openai/v1",
        **({"REFERENCE": str(reference)} if reference.is_file() else {}),
    }
    return {f"{PREFIX}{name}": value for name, value in settings.items()}


@contextmanager
def _running(name: str, command: Sequence[str], environment: dict[str, str], root: Path) -> Iterator[Child]:
    """A process that ends with the block, with time for the requests that it serves."""
    log = root / "serve" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603  our own program
            command,
            cwd=PROJECT,
            env={"GOMP_SPINCOUNT": "6000", **os.environ, "PYTHONWARNINGS": "ignore", **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to us, and we end the parts in order
            preexec_fn=die_with_parent(),
        )
    try:
        yield Child(name, process, log)
    finally:
        stop(process, _STOP_SECONDS)


def _wait(child: Child, url: str, all_of: Sequence[Child]) -> None:
    """Until `url` answers 200. ValueError with the end of the log when the process ends or takes too long."""
    print(f"{child.name}: starting (log: {child.log})", flush=True)
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        _all_run(all_of)
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  our own address
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass  # not yet: the deadline decides
        time.sleep(0.2)
    raise ValueError(
        f"{child.name} was not ready after {_READY_SECONDS:.0f} s; the end of {child.log}:\n{child.tail()}"
    )


def _all_run(children: Sequence[Child]) -> None:
    for child in children:
        if child.process.poll() is not None:
            raise ValueError(
                f"{child.name} ended with {child.process.returncode}; the end of {child.log}:\n{child.tail()}"
            )


def _tell(url: str, digest: str, candidate: bool, key: str, root: Path) -> None:
    image = example(root)
    state = "a candidate that nobody has approved" if candidate else "approved"
    print(f"\nserving release {digest[:12]} ({state})")
    print(f"page:    {url}/")
    print(f"key:     {key}")
    print(f"ask:     medforge ask {image} 'Where is the lesion?'")
    print(f"curl:    curl -H 'Authorization: Bearer {key}' -F image=@{image} \\")
    print(f"           -F question='What imaging modality is this?' {url}/v1/diagnose")
    print("Ctrl-C stops it.", flush=True)


def example(root: Path) -> Path:
    """A generated image to ask about."""
    import numpy as np
    from PIL import Image

    from medforge.drawing import draw, random_scene

    path = root / "serve" / "example.png"
    pixels = draw(random_scene(np.random.default_rng(7)), 224)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".png", delete=False) as stream:
        Image.fromarray(pixels).save(stream, format="PNG")
    Path(stream.name).replace(path)
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


if __name__ == "__main__":
    raise SystemExit(main())
