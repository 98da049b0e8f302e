"""Requests, and an engine that serves for the length of a block."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from medforge.models.encode import Encoded
from medforge.records import IMAGE_MARK, Turn
from serving.predictor.engine import Engine
from serving.predictor.generation import Done, Event, Generation, Job, Piece, Request
from serving.predictor.metrics import Metrics
from serving.predictor.plane import Ask, Plane
from tests.unit.models.examples import picture, sample

QUESTIONS = ("Where is it?", "Is there a lesion in this image? Say yes or no.", "肺部有病变吗？请说明位置。")


def file(seed: int = 0, kind: str = "PNG", width: int = 100, height: int = 60) -> bytes:
    """An image file of noise."""
    stream = io.BytesIO()
    picture(seed, width, height).save(stream, kind)
    return stream.getvalue()


def data_uri(seed: int = 0) -> str:
    """The same as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(file(seed)).decode()


def ask(question: str = QUESTIONS[0], images: int = 1, **changes: Any) -> Ask:
    """A question about `images` images."""
    files = tuple(file(number) for number in range(images))
    return Ask((Turn("user", IMAGE_MARK * images + question),), files, **changes)


def prompts(generation: Generation) -> list[Encoded]:
    """Prompts of unlike length about one image, two and none."""
    made = []
    for count, question in zip((1, 2, 0), QUESTIONS, strict=True):
        images = [picture(number, 100, 60 + 40 * number) for number in range(count)]
        turns = [("user", IMAGE_MARK * count + question), ("assistant", "")]
        made.append(generation.encoder.encode_prompt(sample(turns, images), images))
    return made


def answered(generation: Generation, jobs: list[Job]) -> list[list[Event]]:
    """What each job is told when all are one batch."""
    told: dict[Request, list[Event]] = {Request(job): [] for job in jobs}

    def tell(events: list[tuple[Request, Event]]) -> None:
        for request, event in events:
            told[request].append(event)

    generation.run(list(told), tell)
    return list(told.values())


def text_of(events: list[Event]) -> str:
    """The answer that the events make."""
    return "".join(event.text for event in events if isinstance(event, Piece))


def end_of(events: list[Event]) -> Done:
    """Its end, which has to be the last event, and the only one of its kind."""
    assert [isinstance(event, Done) for event in events].count(True) == 1
    assert isinstance(events[-1], Done)
    return events[-1]


@asynccontextmanager
async def serving(generation: Any, **options: Any) -> AsyncIterator[Engine]:
    """An engine that answers with `generation` while the block runs."""
    engine = Engine(generation, Metrics(CollectorRegistry()), **options)
    task = asyncio.ensure_future(engine.serve())
    try:
        yield engine
    finally:
        engine.stop()
        await asyncio.wait_for(task, 30)


@asynccontextmanager
async def planes(generation: Generation, **options: Any) -> AsyncIterator[Plane]:
    """A plane in front of such an engine; `max_new_tokens` and `timeout` are the plane's."""
    own = {"max_new_tokens": options.pop("max_new_tokens", 16), "timeout": options.pop("timeout", 60.0)}
    async with serving(generation, **options) as engine:
        yield Plane(engine, generation, **own)


async def collect(engine: Engine, job: Job, seconds: float = 30.0) -> list[Event]:
    """All events of one job."""
    with engine.place(seconds) as place:
        async with aclosing(engine.events(job, place)) as events:
            return [event async for event in events]


def metric(engine: Engine, name: str, **labels: str) -> float | None:
    """A figure of the engine's metrics; None where there is none yet."""
    return engine._metrics.registry.get_sample_value(f"medforge_predictor_{name}", labels)
