"""The contenders, each a server in a process of its own: the upstream itself, MedForge's gateway, and the peers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.environments import Environment
from benchmarks.gateway.upstream import ANSWER, MODEL, READS
from medforge.files import write_json
from medforge.lifetime import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
DIRECT, NAME, PLAIN, LITELLM = "direct", "medforge", "fastapi+httpx", "litellm"
OWN = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}
CHAT = "/v1/chat/completions"
_START_SECONDS, _STOP_SECONDS = 180.0, 15.0

_SERVER = ("fastapi==0.165.0", "uvicorn[standard]==0.54.0")  # the versions that MedForge's gateway was measured with
# LiteLLM 1.82.7, 1.82.8 and 1.107.0 on PyPI carried malware, and before 1.83.7 its proxy had CVE-2026-42208: the
# version is a fixed one
PEERS = {
    PLAIN: Environment("plain-proxy", (*_SERVER, "httpx==0.28.1")),
    LITELLM: Environment("litellm", ("litellm[proxy]==1.99.4",)),
}
PACKAGES = {
    NAME: ("medforge", "fastapi", "uvicorn", "aiohttp", "uvloop", "httptools"),
    PLAIN: ("fastapi", "uvicorn", "httpx", "uvloop", "httptools"),
    LITELLM: ("litellm", "fastapi", "uvicorn", "aiohttp", "httpx"),
}


@dataclass(frozen=True)
class Place:
    """Where a server runs: its port, the upstream's base URL, and a folder of its own."""

    port: int
    upstream: str
    folder: Path


@dataclass(frozen=True)
class Launch:
    """How a server is started, and the headers that its callers send."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


Starter = Callable[[Place], Launch]


@dataclass(frozen=True)
class Server:
    """A server that answers: its URL for chat completions, its callers' headers, its process."""

    url: str
    headers: Mapping[str, str]
    process: subprocess.Popen[bytes]


def _uvicorn(python: Path | str, app: str, folder: Path, port: int) -> list[str]:
    return [
        *(str(python), "-m", "uvicorn", app, "--app-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)),
        *("--no-access-log", "--log-level", "warning"),
    ]


def upstream(place: Place) -> Launch:
    """The mock of a predictor."""
    return Launch(_uvicorn(sys.executable, "benchmarks.gateway.upstream:app", ROOT, place.port), OWN)


def reading(place: Place) -> Launch:
    """The mock that parses what it is sent and decodes the image."""
    launch = upstream(place)
    return replace(launch, environment={**launch.environment, READS: "1"})


def plain(python: Path, place: Place) -> Launch:
    """FastAPI and httpx; no access log, which favours it."""
    return Launch(
        _uvicorn(python, "plain:app", Path(__file__).parent, place.port), {"BENCHMARK_UPSTREAM": f"{place.upstream}/"}
    )


def litellm(python: Path, place: Place) -> Launch:
    """LiteLLM's proxy with one model and a key, quiet and with one worker."""
    key = "sk-benchmark"
    config = place.folder / "config.yaml"  # JSON is YAML
    parameters = {"model": f"openai/{MODEL}", "api_base": place.upstream, "api_key": "none"}
    write_json(
        config,
        {
            "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
            "general_settings": {"master_key": key},
        },
    )
    command = [
        *(str(python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1", "--port", str(place.port)),
        *("--num_workers", "1", "--telemetry", "False"),
    ]
    quiet = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return Launch(command, quiet, {"Authorization": f"Bearer {key}"})


def gateway(place: Place) -> Launch:
    """MedForge's gateway as it comes, but for limits that the load would reach: keys, image checks, audit, metrics."""
    data = place.folder / "data"
    shutil.rmtree(data, ignore_errors=True)  # of the round before
    settings = {
        "PORT": str(place.port),
        "STABLE": place.upstream,
        "DATA_DIR": str(data),
        "SECRET_KEY": "benchmark" * 4,
        "RATE": "1000000/second",
        "QUOTA": "1000000000/day",
    }
    environment = OWN | {f"MEDFORGE_GATEWAY_{name}": value for name, value in settings.items()}
    return Launch(
        [sys.executable, "-m", "serving.gateway"], environment, {"Authorization": f"Bearer {_key(data, environment)}"}
    )


def _key(data: Path, environment: Mapping[str, str]) -> str:
    """A new API key for the gateway whose data are in the folder."""
    named = ["keys", "add", "benchmark", "--scopes", "chat", "--data-dir", str(data)]
    command = [sys.executable, "-m", "medforge", *named]
    made = subprocess.run(command, capture_output=True, text=True, env=_clean(environment), cwd=ROOT)  # noqa: S603
    keys = [word for word in made.stdout.split() if word.startswith("mf_")]
    if made.returncode or len(keys) != 1:
        raise ValueError(f"no API key could be made: {(made.stderr or made.stdout).strip()[-500:]}")
    return keys[0]


@contextmanager
def running(contender: str, launch: Starter, upstream: str, folder: Path, body: bytes) -> Iterator[Server]:
    """The server, once it answers a request as the upstream does, until the block ends.

    ValueError with the end of its log (in `folder`) where it ends, or does not answer so in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(_free_port(), upstream, folder)
    started = launch(place)
    log = folder / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603  the benchmark's own commands
            started.command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,  # no .env of the project is read
            env=_clean(started.environment),
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
    try:
        server = Server(f"http://127.0.0.1:{place.port}{CHAT}", started.headers, process)
        _wait(contender, server, body, log)
        yield server
    finally:
        _stop(process)


def ask(server: Server, body: bytes, seconds: float = 10.0) -> str:
    """The text that answers one request. OSError or ValueError where there is none."""
    headers = {"Content-Type": "application/json", **server.headers}
    request = urllib.request.Request(server.url, body, headers)  # noqa: S310  our own address
    with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310
        document = json.load(answer)
    try:
        return str(document["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError):
        raise ValueError("what answered is no completion of OpenAI's API") from None


def check(contender: str, server: Server, body: bytes) -> None:
    """ValueError unless a request is answered with the upstream's own text."""
    answered = ask(server, body)
    if answered != ANSWER:
        raise ValueError(f"{contender} answers {answered!r}, but the upstream says {ANSWER!r}")


def _wait(contender: str, server: Server, body: bytes, log: Path) -> None:
    deadline, why = time.monotonic() + _START_SECONDS, ""
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ValueError(f"{contender} ended with {server.process.returncode}, see {log}: {_tail(log)}")
        try:
            return check(contender, server, body)
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.read(300).decode(errors='replace')}"
        except (OSError, ValueError) as error:
            why = str(error)  # not yet: the deadline decides
        time.sleep(0.3)
    raise ValueError(f"{contender} did not answer within {_START_SECONDS:.0f} s ({why}), see {log}: {_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and end what is left of it and of what it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without the caller's own settings of a gateway, and with ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEDFORGE_", "LITELLM_"))}
    return kept | dict(environment)


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-5:])[-800:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
