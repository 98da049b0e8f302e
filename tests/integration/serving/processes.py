"""The gateway as an operator runs it: a process of its own, its settings in the environment, its log in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
from pydantic import SecretStr

from serving.gateway.settings import PREFIX, Settings
from tests.unit.gateway.conftest import until

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Running:
    """A gateway's process; `client` has no key."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    @property
    def resident(self) -> int:
        """Bytes of memory that it holds."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics by name and labels, as the text has them."""
        lines = self.client.get("/metrics").raise_for_status().text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}


@contextmanager
def gateway_process(settings: Settings) -> Iterator[Running]:
    """`python -m serving.gateway` with these settings, on a free port, until the block ends."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        environment[PREFIX + name.upper()] = text if isinstance(text, str) else _encode(text)
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    folder = settings.data_dir.parent
    log = folder / "gateway.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.gateway"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{_port(process, log)}"
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            yield Running(url, process, log, client)
    finally:
        process.kill()
        process.wait()


def _encode(value: Any) -> str:
    return str(value) if isinstance(value, Path) else msgspec.json.encode(value).decode()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port that the log names, once it does."""
    found: list[int] = []

    def named() -> bool:
        assert process.poll() is None, log.read_text()
        events = [msgspec.json.decode(line) for line in log.read_bytes().splitlines() if line.startswith(b"{")]
        found.extend(event["port"] for event in events if event.get("event") == "listening")
        return bool(found)

    until(named, 60)
    return found[0]
