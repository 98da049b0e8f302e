"""One question put to a model: locate → verify → diagnose.

| | upstream with task heads | any other upstream |
|---|---|---|
| locate | the region head, with the answer | it is asked for a bounding box, which is read from its text |
| verify | the match head judges the answer, or the claim that the finding is there | it is asked back: yes or no |
| diagnose | the answer itself | the same |

An upstream with heads needs one request for that, others need three. The task `locate` verifies first that the finding
is there at all, as a model asked "Where is it?" names a place even where there is none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.gateway import api, prompts
from serving.gateway.answers import Completion
from serving.gateway.balance import Track
from serving.gateway.errors import GatewayError
from serving.gateway.images import Picture
from serving.gateway.parts import Context, Parts
from serving.gateway.regions import Box, regions, text_boxes
from serving.gateway.verification import confidence, decide, falls_short, is_refusal, read_finding, yes_probability

Tell = Callable[[str, Any], Awaitable[None]]

_TOP = 20  # tokens whose probabilities are asked for where yes and no are weighed: all that OpenAI's API gives
_CLOSED_TOKENS, _BOX_TOKENS = 16, 96


@dataclass(frozen=True)
class Outcome:
    """What came of it. `reason` is None where the answer may be shown; `text` and `finding` are as the model said."""

    reason: api.Reason | None
    text: str | None
    finding: api.Finding | None
    regions: list[api.Region]
    match: api.Score | None
    confidence: api.Score | None
    release: api.Release
    usage: api.Usage


class Consultation:
    """A question about pictures, put to the upstream of a track. `told` says whether a part of an answer went out.

    `first` is the picture that regions are of, `images` are all of them as parts of a message.
    """

    def __init__(
        self,
        parts: Parts,
        question: api.Question,
        first: Picture,
        images: prompts.Content,
        context: Context,
        track: Track,
        tell: Tell | None,
    ) -> None:
        self._upstreams, self._settings = parts.upstreams, parts.settings
        self._question, self._context, self._track, self._tell = question, context, track, tell
        self._first, self._images = first, images
        self._can = parts.upstreams.capabilities(track)
        self._bare = self._can.release is not None  # MedForge's own models know the words of their training
        self._release: api.Release | None = None
        self._usage = api.Usage()
        self.told = False

    async def run(self) -> Outcome:
        """Ask what is to be asked. GatewayError as `Upstreams.complete` raises it."""
        task, match = self._question.task, None
        if task == "locate":
            match = await self._presence()
            if falls_short(match, self._settings.match_threshold):
                return self._outcome("low-match", match=match)
        named: list[Box] = []
        if task != "report" and "region" not in self._can.heads:
            named = await self._grounding()
            if task == "locate" and not self._regions(named, "text"):
                return self._outcome("no-region", match=match)
        said = await self._answer()
        found = self._found(said, named)
        if task == "locate" and not found:
            return self._outcome("no-region", match=match)
        finding = None
        if task == "finding":
            finding = read_finding((self._question.finding or "").strip(), said.text, said.tokens)
            found = found if finding is not None and finding.present else []  # there is no place of what is not there
        if task != "locate":
            match = await self._match(said)
        sure = _score(confidence(said.tokens), self._settings.confidence_threshold, "tokens")
        reason = decide(said.text, said.finish_reason, task, finding, match, sure, self._settings)
        return self._outcome(reason, said.text, finding, found, match, sure)

    async def _presence(self) -> api.Score | None:
        """How likely the finding is there at all."""
        await self._status("verifying")
        if "match" in self._can.heads:
            claim = {"match": True, "claim": prompts.YES[self._question.language]}
            said = await self._ask(prompts.presence(self._question, bare=True), 1, 0, claim)
            return _score(said.match, self._settings.match_threshold, "head")
        said = await self._ask(prompts.presence(self._question, self._bare), _CLOSED_TOKENS, _TOP)
        return _score(yes_probability(said.tokens), self._settings.match_threshold, "question")

    async def _grounding(self) -> list[Box]:
        """The boxes that the model writes when it is asked for them."""
        await self._status("locating")
        said = await self._ask(prompts.grounding(self._question), _BOX_TOKENS, 0)
        return text_boxes(said.text, self._can, self._first)

    async def _answer(self) -> Completion:
        """The answer itself, told piece by piece where somebody listens."""
        heads = self._can.heads
        closed = self._question.task == "finding"
        await self._status("locating" if "region" in heads and self._question.task != "report" else "answering")
        extension = {
            "region": "region" in heads and self._question.task != "report",
            "match": "match" in heads and self._question.task != "locate",
        }
        longest = min(_CLOSED_TOKENS, self._settings.max_tokens) if closed else self._settings.max_tokens
        body = self._body(prompts.main(self._question, self._bare), longest, _TOP if closed else 0, extension)
        if self._tell is None:
            return self._took(await self._upstreams.complete(body, self._context, self._track))
        async for piece in self._upstreams.stream(body, self._context, self._track):
            if isinstance(piece, Completion):
                return self._took(piece)
            self.told = True
            await self._tell("delta", {"text": piece, "provisional": True})
        raise AssertionError("a stream ends with its completion")

    async def _match(self, said: Completion) -> api.Score | None:
        """How well the answer fits the image; None where there is no answer to judge, or nothing that judges it."""
        if "match" in self._can.heads:
            return _score(said.match, self._settings.match_threshold, "head")
        if not said.text.strip() or is_refusal(said.text):
            return None
        await self._status("verifying")
        asked = await self._ask(prompts.verification(self._question, said.text), _CLOSED_TOKENS, _TOP)
        return _score(yes_probability(asked.tokens), self._settings.match_threshold, "question")

    async def _ask(self, text: str, longest: int, top: int, extension: dict[str, Any] | None = None) -> Completion:
        body = self._body(text, longest, top, extension or {})
        return self._took(await self._upstreams.complete(body, self._context, self._track))

    def _body(self, text: str, longest: int, top: int, extension: dict[str, Any]) -> dict[str, Any]:
        body = {
            "messages": [{"role": "user", "content": [*self._images, {"type": "text", "text": text}]}],
            "max_tokens": longest,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": top,
        }
        return body | {"medforge": extension} if any(extension.values()) else body

    def _took(self, said: Completion) -> Completion:
        """Count an answer. One release has to give all of them, or its digest would be told of another's words."""
        if self._release is not None and said.release.digest != self._release.digest:
            message = "The model was exchanged while it was asked; send the request again"
            raise GatewayError(503, "release-changed", message, None, 1)
        self._release = said.release
        self._usage = api.Usage(**{name: count + getattr(said.usage, name) for name, count in self._usage})
        return said

    def _found(self, said: Completion, named: list[Box]) -> list[api.Region]:
        """The head's region, or those that were asked for; and those that the answer itself names."""
        head = self._regions([said.region], "head") if said.region is not None else []
        written = self._regions([*named, *text_boxes(said.text, self._can, self._first)], "text")
        return head + written

    def _regions(self, boxes: Sequence[Box], source: str) -> list[api.Region]:
        label = self._question.finding or {"en": "region", "zh": "区域"}[self._question.language]
        return regions(boxes, label.strip(), source, self._first)

    async def _status(self, stage: str) -> None:
        if self._tell is not None:
            await self._tell("status", {"stage": stage})

    def _outcome(
        self,
        reason: api.Reason | None,
        text: str | None = None,
        finding: api.Finding | None = None,
        found: Sequence[api.Region] = (),
        match: api.Score | None = None,
        sure: api.Score | None = None,
    ) -> Outcome:
        release = self._release or self._upstreams.release(self._track)
        return Outcome(reason, text, finding, list(found), match, sure, release, self._usage)


def _score(value: float | None, threshold: float, source: str) -> api.Score | None:
    return (
        None if value is None else api.Score.model_validate({"value": value, "threshold": threshold, "source": source})
    )
