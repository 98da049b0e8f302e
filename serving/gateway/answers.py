"""What upstreams say, read: /models, whole answers and streams of /chat/completions, with MedForge's extension."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from serving.gateway import api
from serving.gateway.balance import Track
from serving.gateway.errors import GatewayError

_FAMILIES = {"qwen3-vl": "qwen3-vl", "qwen2.5-vl": "qwen2.5-vl", "qwen2-vl": "qwen2-vl"}  # in a model's name → family
_LONGEST_EVENT = 4 << 20  # bytes


@dataclass(frozen=True)
class Capabilities:
    """What an upstream says of itself; what vLLM does not say is empty or None. Pixels are width times height."""

    model: str
    release: str | None = None
    version: str | None = None
    heads: frozenset[str] = frozenset()
    family: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """A token of the answer; `logprob` natural; `top` maps the likeliest tokens' texts to theirs."""

    text: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True)
class Completion:
    """An answer. `tokens` is empty where no logprobs were asked for; `region` (shares 0–1) and `match` (a probability)
    are None where no head gave them."""

    text: str
    finish_reason: str
    tokens: tuple[Token, ...]
    usage: api.Usage
    region: tuple[float, ...] | None
    match: float | None
    track: Track
    release: api.Release


class _About(msgspec.Struct):
    release: str | None = None
    version: str | None = None
    heads: list[str] = []
    family: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    about: dict[str, Any] = {}


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    medforge: _About | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Top(msgspec.Struct):
    token: str
    logprob: float | None = None


class _Logprob(_Top):
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct):
    content: list[_Logprob] | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    delta: _Message | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    total_tokens: int = 0


class _Extension(msgspec.Struct):
    release: str | None = None
    region: tuple[float, float, float, float] | None = None
    match: float | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    medforge: _Extension | None = None
    error: Any = None


_models = msgspec.json.Decoder(_Models)
_answer = msgspec.json.Decoder(_Answer)


def capabilities_of(data: bytes) -> Capabilities:
    """What `GET /models` says; the entry with MedForge's extension is taken before others. ValueError if it is none."""
    try:
        models = _models.decode(data).data
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ValueError("answers /models with what is no list of models") from None
    if not models:
        raise ValueError("serves no model")
    model = next((one for one in models if one.medforge), models[0])
    about = model.medforge or _About()
    named = f"{model.id} {model.root or ''}".lower()
    family = about.family or next((family for name, family in _FAMILIES.items() if name in named), None)
    return Capabilities(
        model.id, about.release, about.version, frozenset(about.heads), family,
        about.min_pixels, about.max_pixels, about.about,
    )  # fmt: skip


def completion_of(data: bytes, track: Track, release: api.Release) -> Completion:
    """A whole answer. GatewayError 502 if it is none."""
    answer = _decoded(data)
    if not answer.choices or answer.choices[0].message is None:
        raise garbage("without an answer in it")
    choice = answer.choices[0]
    text = choice.message.content if choice.message else None
    return _completion(text or "", choice.finish_reason or "stop", _tokens(choice), answer, track, release)


async def events(chunks: AsyncIterator[bytes], track: Track, release: api.Release) -> AsyncIterator[str | Completion]:
    """A stream of server-sent events, in pieces cut anywhere: the answer's texts, then the Completion.

    GatewayError 502 if it is garbage or ends before `[DONE]`.
    """
    texts: list[str] = []
    tokens: list[Token] = []
    last, finish = _Answer(), ""
    async for data in _data_lines(chunks):
        if data == b"[DONE]":
            yield _completion("".join(texts), finish or "stop", tuple(tokens), last, track, release)
            return
        answer = _decoded(data)
        if answer.error is not None:
            raise GatewayError(502, "upstream-error", "The model's server failed while it answered; send it again")
        last = _Answer(usage=answer.usage or last.usage, medforge=answer.medforge or last.medforge)
        for choice in answer.choices[:1]:
            finish = choice.finish_reason or finish
            tokens += _tokens(choice)
            if choice.delta and choice.delta.content:
                texts.append(choice.delta.content)
                yield choice.delta.content
    raise garbage("that breaks off")


async def _data_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The `data:` of each event. OpenAI's API sends one line an event."""
    waiting = b""
    async for chunk in chunks:
        *lines, waiting = (waiting + chunk).split(b"\n")
        if len(waiting) > _LONGEST_EVENT:
            raise garbage("without an end of line")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _decoded(data: bytes) -> _Answer:
    try:
        return _answer.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):  # never repeated: it may hold anything
        raise garbage("that is not of OpenAI's API") from None


def _tokens(choice: _Choice) -> tuple[Token, ...]:
    content = (choice.logprobs and choice.logprobs.content) or ()
    return tuple(
        Token(one.token, one.logprob, {top.token: top.logprob for top in one.top_logprobs if top.logprob is not None})
        for one in content
        if one.logprob is not None
    )


def _completion(
    text: str, finish: str, tokens: tuple[Token, ...], answer: _Answer, track: Track, release: api.Release
) -> Completion:
    extension = answer.medforge or _Extension()
    if extension.release and extension.release != release.digest:  # it was exchanged since it was last looked at
        release = release.model_copy(update={"digest": extension.release, "version": None})
    if extension.region and not (all(0 <= side <= 1 for side in extension.region)):
        raise garbage("with a region outside the image")
    if extension.match is not None and not 0 <= extension.match <= 1:
        raise garbage("with a match that is no probability")
    usage = answer.usage or _Usage()
    counts = api.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens or 0,
        total_tokens=usage.total_tokens,
    )
    return Completion(text, finish, tokens, counts, extension.region, extension.match, track, release)


def garbage(what: str) -> GatewayError:
    """502: the upstream's answer makes no sense."""
    return GatewayError(502, "upstream-garbage", f"The model's server sent an answer {what}; send the request again")
