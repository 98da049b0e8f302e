"""Between the protocols and the engine: what is asked becomes the model's tensors, and the same checks hold for all."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import re
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medforge.models.encode import CONTROL, Encoded
from medforge.records import BOX_MARK, IMAGE_MARK, ImageRef, Sample, Turn
from serving.predictor.engine import Engine
from serving.predictor.errors import Refusal, bad_request, internal, outline
from serving.predictor.generation import GREEDY, Done, Event, Generation, Job, Piece, Region, Sampling, Token

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000  # of an image before it is decoded
_HAN = re.compile("[\u3400-\u9fff]")


@dataclass(frozen=True)
class Ask:
    """A conversation that ends with a user's turn. IMAGE_MARK stands in users' turns where `images`, files, belong.

    `max_tokens` None: as many as the server allows. `claim` None with `match`: the answer itself is judged.
    """

    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    max_tokens: int | None = None
    sampling: Sampling = GREEDY
    region: bool = False
    match: bool = False
    claim: str | None = None


@dataclass(frozen=True)
class Begun:
    """The first thing that is told of an answer: the request holds, and its prompt has so many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: str
    tokens: tuple[Token, ...]
    prompt_tokens: int
    completion_tokens: int
    region: Region | None
    match: float | None


class Plane:
    """Prepares what is asked, in threads of its own, and has the engine answer it."""

    def __init__(self, engine: Engine, generation: Generation, *, max_new_tokens: int, timeout: float) -> None:
        self.engine, self.generation = engine, generation
        self.max_new_tokens, self.timeout = max_new_tokens, timeout
        self.context = int(generation.model.config.get_text_config().max_position_embeddings)
        self._workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="prepare")

    @property
    def heads(self) -> list[str]:
        """The task heads of the release: region, match."""
        heads = self.generation.heads
        there = {"region": heads and heads.region_head, "match": heads and heads.match_head}
        return [name for name, head in there.items() if head is not None]

    async def stream(self, ask: Ask, seconds: float | None = None) -> AsyncGenerator[Begun | Event, None]:
        """`Begun`, the pieces of the answer, and its `Done`, within so many seconds. Close it always.

        Refusal 400 when what is asked cannot be, 429 when too much waits, 504 when its time is up.
        """
        with self.engine.place(min(seconds or self.timeout, self.timeout)) as place:
            loop = asyncio.get_running_loop()
            try:
                job = await asyncio.wait_for(loop.run_in_executor(self._workers, self.prepare, ask), place.left)
            except asyncio.TimeoutError:
                raise place.expired() from None
            except Refusal:
                raise
            except Exception as error:
                log.error("a request could not be prepared: %s", outline(error))
                raise internal() from None
            async with aclosing(self.engine.events(job, place)) as events:
                first = True
                async for event in events:
                    if first:
                        yield Begun(job.prompt.length)
                        first = False
                    yield event

    async def answer(self, ask: Ask, seconds: float | None = None) -> Answer:
        """The whole answer. Raises as `stream` does."""
        text: list[str] = []
        tokens: list[Token] = []
        prompt = 0
        async with aclosing(self.stream(ask, seconds)) as events:
            async for event in events:
                if isinstance(event, Begun):
                    prompt = event.prompt_tokens
                elif isinstance(event, Piece):
                    text.append(event.text)
                    tokens += event.tokens
                elif isinstance(event, Done):
                    done = event
        return Answer(
            text="".join(text),
            finish_reason=done.finish_reason,
            tokens=tuple(tokens),
            prompt_tokens=prompt,
            completion_tokens=done.completion_tokens,
            region=done.region,
            match=done.match,
        )

    def prepare(self, ask: Ask) -> Job:
        """What is asked as a job for the model. Blocking. Refusal 400 names what is wrong with it."""
        for name, wanted in (("region", ask.region), ("match", ask.match)):
            if wanted and name not in self.heads:
                raise bad_request("no-head", f"this release has no {name} head; leave it out", f"medforge.{name}")
        encoder = self.generation.encoder
        images = [read_image(data, f"images.{number}") for number, data in enumerate(ask.images)]
        sample = _sample(ask.turns, images)
        try:
            seen = encoder.see(images)
        except ValueError:
            raise bad_request(
                "image-shape", "images: one is more than 200 times as long as wide; crop it", "images"
            ) from None
        prompt = encoder.encode_prompt(sample, seen)

        def claim(answer: str) -> Encoded | None:
            """None for an answer that cannot be put to the head: an empty one, or one that holds a control token."""
            if not answer or forged(answer):
                return None
            return encoder.encode_claim(sample, seen, answer)

        given = claim(ask.claim) if ask.match and ask.claim is not None else None
        return Job(
            prompt=prompt,
            max_tokens=self._tokens(prompt.length, ask.max_tokens),
            sampling=ask.sampling,
            region=ask.region,
            claim=None if not ask.match or not images else claim if ask.claim is None else lambda _: given,
        )

    def _tokens(self, prompt: int, wanted: int | None) -> int:
        if wanted is not None and wanted > self.max_new_tokens:
            message = f"{wanted} tokens are more than the {self.max_new_tokens} that this server gives"
            raise bad_request("max-tokens", message, "max_tokens")
        room = self.context - prompt
        if room < (wanted or 1):
            message = (
                f"the conversation has {prompt} tokens, images counted, and {wanted or 1} are to come, but the model "
                f"takes {self.context}; shorten it, or send fewer images"
            )
            raise bad_request("context-length", message, "messages")
        return wanted or min(self.max_new_tokens, room)


def read_image(data: bytes, param: str) -> Image:
    """A PNG or JPEG file as an RGB image. Blocking. Refusal 400 names `param` when it is none, or too large."""
    from PIL import Image

    from medforge.dataset import decode_image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:  # the header only
            width, height = opened.size
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS  # more than Pillow's own limit, which is above ours
    except Exception:  # as below
        raise bad_request("image-unreadable", f"{param}: is no PNG or JPEG file, or a broken one", param) from None
    if width * height > MAX_PIXELS:
        message = f"{param}: has more than {MAX_PIXELS} pixels; reduce it"
        raise bad_request("image-too-large", message, param)
    try:
        return decode_image(data)
    except MemoryError:
        raise
    except Exception:  # decoders raise whatever a broken file leads them to: struct.error, IndexError, …
        raise bad_request("image-unreadable", f"{param}: is broken: its pixels cannot be decoded", param) from None


def forged(text: str) -> str | None:
    """The first mark in `text` that only the server may write: a turn's, an image's or a box's. None without any."""
    for mark in (*CONTROL, IMAGE_MARK):
        if mark in text:
            return mark
    found = BOX_MARK.search(text)
    return found.group(0) if found else None


def check_text(text: str, param: str) -> None:
    """Refusal 400 when the text of `param` holds such a mark."""
    if mark := forged(text):
        raise bad_request("forbidden-text", f"{param}: holds {mark}, which only the server may write; remove it", param)


def _sample(turns: Sequence[Turn], images: Sequence[Image]) -> Sample:
    """The conversation as the library knows it. An empty answer at its end is what the model is to write."""
    question = next((turn.text for turn in reversed(turns) if turn.role == "user"), "")
    return Sample(
        id="request",
        images=tuple(ImageRef("", image.width, image.height) for image in images),
        turns=(*turns, Turn("assistant", "")),
        answer_type="open",
        question_type="other",
        language="zh" if _HAN.search(question) else "en",
        study_id="",
        source="request",
        licence="",
        split="test",
    )
