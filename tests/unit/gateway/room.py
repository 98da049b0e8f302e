"""A consultation with upstreams whose answers are written beforehand."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

from PIL import Image

from serving.gateway import api
from serving.gateway.admission import Admission
from serving.gateway.answers import Capabilities, Completion, Token
from serving.gateway.balance import Track
from serving.gateway.diagnose import diagnose
from serving.gateway.errors import GatewayError
from serving.gateway.images import Picture, read_picture
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller, Context, Parts
from serving.gateway.settings import Settings

HEADS = Capabilities("medforge", "d" * 64, "chest 1", frozenset({"region", "match"}), "qwen3-vl", 3136, 1_048_576)
PLAIN = Capabilities("qwen", None, None, frozenset(), "qwen2.5-vl", None, None)
BOX = (0.1, 0.2, 0.5, 0.6)
CALLER = Caller("caller", "", "system", frozenset({"diagnose"}))
CONTEXT = Context("request-1", CALLER, math.inf)


def asked(body: dict[str, Any]) -> str:
    """The text of a request."""
    return str(body["messages"][0]["content"][-1]["text"])


def said(text: str, probability: float = 0.9, yes: float | None = None, **more: Any) -> Completion:
    """A completion of one token; `yes` is the probability of yes against no at it."""
    top = {} if yes is None else {"yes": math.log(max(yes, 1e-9)), "no": math.log(max(1 - yes, 1e-9))}
    values: dict[str, Any] = {
        "finish_reason": "stop",
        "tokens": (Token(text, top.get(text.lower(), math.log(probability)), top),) if text else (),
        "usage": api.Usage(prompt_tokens=10, completion_tokens=1, total_tokens=11),
        "region": None,
        "match": None,
        "track": "stable",
        "release": api.Release(digest="d" * 64, model="medforge"),
    }
    return Completion(text, **values | more)


def dump(value: Any) -> dict[str, Any]:
    return dict(value.model_dump())


Script = Callable[[dict[str, Any]], Completion | GatewayError]


class Upstreams:
    """Scripted answers; `bodies` are what was asked."""

    def __init__(self, can: Capabilities, script: Script, track: Track = "stable") -> None:
        self.can, self.script, self.track = can, script, track
        self.bodies: list[dict[str, Any]] = []
        self.tracks: list[Track] = []

    def choose(self, caller: Caller) -> Track:
        return self.track

    def capabilities(self, track: Track) -> Capabilities:
        return self.can

    def release(self, track: Track) -> api.Release:
        return api.Release(digest="d" * 64, model="medforge", track=track)

    async def complete(self, body: dict[str, Any], context: Context, track: Track) -> Completion:
        self.bodies.append(body)
        self.tracks.append(track)
        answer = self.script(body)
        if isinstance(answer, GatewayError):
            raise answer
        return answer

    async def stream(self, body: dict[str, Any], context: Context, track: Track) -> AsyncIterator[str | Completion]:
        answer = await self.complete(body, context, track)
        for letter in answer.text:
            yield letter
        yield answer

    @property
    def texts(self) -> list[str]:
        return [asked(body) for body in self.bodies]


class Recorder:
    """The audit log, the database's note of answers, and drift."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.answers: list[tuple[str | None, str, str]] = []
        self.images = 0
        self.broken = False
        self.answered = SimpleNamespace(note=lambda row: None)

    async def write(self, entry: dict[str, Any]) -> None:
        if self.broken:
            raise OSError("disk full")
        self.rows.append(entry)

    def note_image(self, statistics: Any) -> None:
        self.images += 1

    def note_answer(self, text: str | None, decision: str, track: str) -> None:
        self.answers.append((text, decision, track))


def png(size: tuple[int, int] = (100, 50)) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize(size).save(stream, "PNG")
    return stream.getvalue()


class Room:
    """Parts of scripted neighbours, and what became of a question put to them."""

    def __init__(self, settings: Settings, can: Capabilities, script: Script, track: Track = "stable") -> None:
        self.settings, self.metrics, self.kept = settings, Metrics(), Recorder()
        self.upstreams = Upstreams(can, script, track)
        self.events: list[tuple[str, Any]] = []

    def ask(self, task: api.Task, stream: bool = False, pictures: int = 1, **fields: Any) -> api.DiagnoseResponse:
        question = api.Question(task=task, **fields)
        shown = [read_picture(png(), self.settings, None, "images.0")] * pictures
        return asyncio.run(self._ask(question, shown, stream))

    async def _ask(self, question: api.Question, shown: list[Picture], stream: bool) -> api.DiagnoseResponse:
        parts = SimpleNamespace(
            settings=self.settings,
            metrics=self.metrics,
            admission=Admission(self.settings, self.metrics),
            upstreams=self.upstreams,
            database=self.kept,
            audit=self.kept,
            drift=self.kept,
        )

        async def tell(event: str, data: Any) -> None:
            self.events.append((event, data))

        return await diagnose(cast(Parts, parts), question, shown, CONTEXT, tell if stream else None)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"medforge_gateway_{name}", labels) or 0.0


def heads(limits: Settings, text: str, match: float | None = 0.9, yes: float | None = None, **more: Any) -> Room:
    """An upstream with heads that always says `text`."""
    return Room(limits, HEADS, lambda body: said(text, yes=yes, match=match, region=BOX, **more))


def plain(limits: Settings, answers: dict[str, Completion], **settings: Any) -> Room:
    """An upstream without heads; `answers` by how the question begins."""

    def script(body: dict[str, Any]) -> Completion:
        return next(answer for start, answer in answers.items() if start in asked(body))

    return Room(limits.model_copy(update=settings), PLAIN, script)


JSON_BOX = '```json\n[{"bbox_2d": [28, 0, 56, 28], "label": "lesion"}]\n```'
