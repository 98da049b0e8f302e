"""The load: one request with an image of about 200 KB, sent by wrk over connections that are kept alive."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gateway.upstream import MODEL

SCRIPT = Path(__file__).with_name("post.lua")
SIDE = 258  # noise does not compress: 258 × 258 × 3 bytes are 200 KB as a PNG too
QUESTION = "Is there a focal lesion in this image?"


@dataclass(frozen=True)
class Sent:
    """What wrk measured: whole requests, seconds, and the latency's median and 99th percentile in milliseconds."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """Requests answered a second."""
        return self.requests / self.seconds


def picture(side: int = SIDE) -> bytes:
    """A PNG of noise, the same each time."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def payload(image: bytes) -> bytes:
    """The request's body: a question about the image, as a data: URI, in the words of OpenAI's API."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 32, "temperature": 0}
    return json.dumps(body).encode()


def find_wrk() -> str:
    """wrk's path. ValueError says how to get it where it is missing."""
    found = shutil.which("wrk")
    if found is None:
        raise ValueError("wrk, which makes the load, is not installed: apt-get install wrk")
    return found


def send(wrk: str, url: str, body: Path, headers: Mapping[str, str], connections: int, seconds: int) -> Sent:
    """Load `url` with the body for so many seconds. ValueError where an answer was an error or a connection broke."""
    given = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    command = [
        *(wrk, "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s", "--timeout", "30s"),
        *("--latency", "--script", str(SCRIPT), *given, url, "--", str(body)),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)  # noqa: S603  our own command
    if ended.returncode:
        raise ValueError(f"wrk failed: {(ended.stderr or ended.stdout).strip()[-500:]}")
    return read(ended.stdout)


def read(output: str) -> Sent:
    """The figures at the end of wrk's output. ValueError where a request was not answered as it should be."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError(f"wrk told nothing: {output.strip()[-500:]}")
    figures: dict[str, Any] = json.loads(lines[-1])
    if figures["bad_status"] or figures["broken"]:
        raise ValueError(
            f"of {figures['requests']} requests {figures['bad_status']} were answered with an error, "
            f"{figures['broken']} broke off or timed out"
        )
    if not figures["requests"]:
        raise ValueError("not one request was answered")
    return Sent(figures["requests"], figures["duration_us"] / 1e6, figures["p50_us"] / 1e3, figures["p99_us"] / 1e3)
