"""routing.json: the predictors behind the tracks and the candidate's share of callers, read again when it changes.

    {"stable": {"url": "http://…/openai/v1", "release": "<digest or empty>"},
     "candidate": null, or the same as stable,
     "weight": 0.1}

On a cluster it is a ConfigMap that is mounted as a folder: the kubelet swaps a link when it changes, so that a file is
seen whole. A file that makes no sense is refused, and what was read before goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from serving.gateway.logs import logger
from serving.gateway.metrics import Metrics

if TYPE_CHECKING:
    from serving.gateway.settings import Settings

SECONDS = 1.0  # between looks at the file
_MOST_BYTES = 1 << 16
_URL = re.compile(r"https?://[^/\s]+\S*")
_DIGEST = re.compile(r"([0-9a-f]{64})?")


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A predictor: the base URL of its OpenAI API, and the digest of the release that it serves, "" if it may be any.

    One that tells another digest itself is not ready; one that tells none (vLLM) is taken at this word.
    """

    url: str
    release: str = ""

    def __post_init__(self) -> None:
        if not _URL.fullmatch(self.url) or self.url.endswith("/"):
            raise ValueError(f"url is {self.url!r}; write http://host/openai/v1, without a slash at its end")
        if not _DIGEST.fullmatch(self.release):
            raise ValueError(f"release is {self.release!r}; the 64 hexadecimal digits of a release, or nothing")


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which predictors there are, and which share (0–1) of the callers is given the candidate."""

    stable: Place
    candidate: Place | None = None
    weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}; a share of callers from 0 to 1")
        if self.weight and self.candidate is None:
            raise ValueError(f"weight is {self.weight}, but there is no candidate")


def parse(data: bytes, where: str) -> Routing:
    """The routing in a file's bytes; ValueError names the field that is wrong."""
    try:
        return msgspec.json.decode(data, type=Routing)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: is no routing: {error}") from None


def read(path: Path) -> tuple[Routing, bytes]:
    """The routing in a file, and its bytes; ValueError if it cannot be read or is none."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None
    return parse(data, str(path)), data


def of_settings(settings: Settings) -> Routing:
    """The routing that the settings STABLE, CANDIDATE, … name, for a gateway without a file of it."""
    candidate = Place(settings.candidate, settings.candidate_release) if settings.candidate else None
    return Routing(Place(settings.stable, settings.stable_release), candidate, settings.candidate_weight)


class Follower:
    """Reads the file again and again; `take` is called with each routing that is new and sound."""

    def __init__(self, path: Path, metrics: Metrics, take: Callable[[Routing], None]) -> None:
        self._path, self._metrics, self._take = path, metrics, take
        self._problem = ""
        self.routing, self._data = read(path)
        self._digest = ""
        self._show()

    async def follow(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(SECONDS)
            try:
                routing, data = await asyncio.to_thread(read, self._path)
            except ValueError as error:
                if str(error) != self._problem:  # once each, and not every second
                    self._metrics.routing_refused.inc()
                    logger().error("routing refused", why=str(error), kept=self._digest)
                    self._problem = str(error)
                continue
            self._problem = ""
            if data != self._data:
                self.routing, self._data = routing, data
                self._show()
                logger().info(
                    "routing", digest=self._digest, weight=routing.weight, stable=routing.stable.release or "any",
                    candidate=routing.candidate and (routing.candidate.release or "any"),
                )  # fmt: skip
                self._take(routing)

    def _show(self) -> None:
        if self._digest:
            self._metrics.routing.remove(self._digest)
        self._digest = hashlib.sha256(self._data).hexdigest()
        self._metrics.routing.labels(self._digest).set(1)
