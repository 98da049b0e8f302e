"""One batch of requests through the model: tokens are handed out as they come, and each request ends by itself.

The model's own `generate` runs the batch. Between two of its steps a `_Batch` sees the scores (it draws the tokens of
requests that sample, and takes down probabilities) and the new tokens (it hands out text, and says who is at an end).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from medforge.models.encode import Encoded, Encoder
from serving.predictor.text import Text, Vocabulary

if TYPE_CHECKING:
    import torch

    from medforge.models.heads import TaskHeads

_GREEDY = 1e-5  # a temperature below it is none: dividing by it would overflow
Region = tuple[float, float, float, float]
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy. `top_logprobs` None: no probabilities; 0: the tokens' own."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


GREEDY = Sampling()


@dataclass(frozen=True)
class Job:
    """What the model is to do for one request.

    `claim` makes of the answer the prompt that the match head judges; None where none can be made.
    """

    prompt: Encoded
    max_tokens: int
    sampling: Sampling = GREEDY
    region: bool = False
    claim: Callable[[str], Encoded | None] | None = None


@dataclass(frozen=True)
class Token:
    """A token of an answer, the natural logarithm of its probability, and the likeliest tokens with theirs."""

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text that was added to an answer, and the tokens since the last piece where probabilities are asked for."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer. `region` is (x1, y1, x2, y2) as shares of the first image, `match` a probability."""

    finish_reason: Finish
    completion_tokens: int
    region: Region | None = None
    match: float | None = None


Event = Piece | Done


class Request:
    """A job in a batch. Whoever asked sets `cancelled` when the answer is no longer wanted."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cancelled = False


Tell = Callable[[list[tuple[Request, Event]]], None]


class Generation:
    """The model, its encoder and its heads. To be used by one thread at a time."""

    def __init__(self, model: Any, encoder: Encoder, heads: TaskHeads | None) -> None:
        self.model, self.encoder, self.heads = model, encoder, heads
        self.vocabulary = Vocabulary(encoder.tokenizer)

    def run(self, requests: Sequence[Request], tell: Tell) -> None:
        """Answer the requests as one batch. `tell` is called in this thread, after each step, with what is new.

        Each request is told of its `Done` last, unless it was cancelled. Raises what the model raises.
        """
        from transformers import LogitsProcessorList, StoppingCriteriaList

        from medforge.models.generate import generate

        batch = _Batch(self, requests, tell)
        watch = self.model.model.register_forward_hook(batch.prefilled)
        try:
            generate(
                self.model,
                self.encoder,
                [request.job.prompt for request in requests],
                max(request.job.max_tokens for request in requests),
                logits_processor=LogitsProcessorList([batch.choose]),
                stopping_criteria=StoppingCriteriaList([batch.follow]),
            )
        finally:
            watch.remove()
        batch.judge()


class _Row:
    """The answer to one request of a batch, as far as it has come."""

    def __init__(self, request: Request, vocabulary: Vocabulary, device: Any) -> None:
        import torch

        self.request, self.job = request, request.job
        self.text = Text(self.job.sampling.stop)
        self.tokens = 0
        self.finish: Finish | None = None
        self.region: Region | None = None
        self.chosen: Token | None = None
        self._vocabulary = vocabulary
        self._held: list[Token] = []
        self.samples = self.job.sampling.temperature >= _GREEDY
        self.generator = torch.Generator(device=device) if self.samples else None
        if self.generator is not None:
            seed = self.job.sampling.seed
            self.generator.seed() if seed is None else self.generator.manual_seed(seed)

    def take(self, token: int, end: int, pad: int) -> Piece | None:
        """Take the next token. Returns what is to be handed out, if anything is."""
        text = ""
        if token == end:
            self.finish = "stop"
        else:
            self.tokens += 1
            if self.chosen is not None:
                self._held.append(self.chosen)
            if token != pad:
                text = self.text.push(self._vocabulary.data(token))
            if self.text.stopped:
                self.finish = "stop"
            elif self.tokens >= self.job.max_tokens:
                self.finish = "length"
        if self.finish is not None:
            text += self.text.close()
        if not text and not self._held:
            return None
        piece, self._held = Piece(text, tuple(self._held)), []
        return piece

    def over(self) -> bool:
        """Whether it takes no more tokens."""
        return self.finish is not None

    def done(self, match: float | None = None) -> Done:
        """Its end."""
        assert self.finish is not None
        return Done(self.finish, self.tokens, self.region, match)


class _Batch:
    """What happens between the steps of `generate`."""

    def __init__(self, generation: Generation, requests: Sequence[Request], tell: Tell) -> None:
        self._generation, self._tell = generation, tell
        self._rows = [_Row(request, generation.vocabulary, generation.model.device) for request in requests]
        self._prefilled = False

    def prefilled(self, module: Any, arguments: Any, output: Any) -> None:
        """Forward hook: the state of each prompt's last token, which the region head reads, passes by once."""
        if self._prefilled:
            return
        self._prefilled = True
        places = [n for n, row in enumerate(self._rows) if row.job.region and len(row.job.prompt.grid)]
        heads = self._generation.heads
        if not places or heads is None:
            return
        from medforge.models.heads import to_xyxy

        pooled = output.last_hidden_state[:, -1][places].float()  # padding stands on the left
        boxes = to_xyxy(heads.region(pooled)).clamp(0, 1).tolist()
        for place, (x1, y1, x2, y2) in zip(places, boxes, strict=True):
            self._rows[place].region = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))

    def choose(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits processor: `scores` [rows, vocabulary], in which a token that was drawn is made the greatest."""
        for number, row in enumerate(self._rows):
            if row.over():
                continue
            token = _draw(scores[number], row.job.sampling, row.generator) if row.samples else None
            if row.job.sampling.top_logprobs is not None:
                row.chosen = self._note(scores[number], token, row.job.sampling.top_logprobs)
            if token is not None:
                scores[number] = -float("inf")
                scores[number, token] = 0.0
        return scores

    def _note(self, scores: torch.Tensor, token: int | None, top: int) -> Token:
        """The token's probability as the model gives it, before temperature and top_p."""
        token = int(scores.argmax()) if token is None else token
        logprobs = scores.log_softmax(-1)
        values, ids = logprobs.topk(min(top, len(logprobs)))
        data = self._generation.vocabulary.data
        likeliest = tuple((data(other), value) for other, value in zip(ids.tolist(), values.tolist(), strict=True))
        return Token(data(token), float(logprobs[token]), likeliest)

    def follow(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        """Stopping criterion: which rows are at an end, bool of [rows]. Their new tokens are the last column."""
        import torch

        encoder = self._generation.encoder
        events: list[tuple[Request, Event]] = []
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.over():
                continue
            if row.request.cancelled:
                row.finish = "cancelled"
                continue
            piece = row.take(token, encoder.end_id, encoder.pad_id)
            if piece is not None:
                events.append((row.request, piece))
            if row.over() and row.job.claim is None:
                events.append((row.request, row.done()))
        if events:
            self._tell(events)
        return torch.tensor([row.over() for row in self._rows], device=input_ids.device)

    def judge(self) -> None:
        """Let the match head judge the claims, and end the requests that made them."""
        from medforge.models.generate import pooled

        rows = [row for row in self._rows if row.job.claim and row.finish != "cancelled" and not row.request.cancelled]
        claims = [(row, row.job.claim(row.text.answer)) for row in rows if row.job.claim is not None]
        judged = [(row, claim) for row, claim in claims if claim is not None]
        scores: dict[_Row, float] = {}
        heads = self._generation.heads
        if judged and heads is not None:
            states = pooled(self._generation.model, self._generation.encoder, [claim for _, claim in judged])
            fits = heads.match(states).sigmoid().tolist()
            scores = {row: fit for (row, _), fit in zip(judged, fits, strict=True)}
        if rows:
            self._tell([(row.request, row.done(scores.get(row))) for row in rows])


def _draw(scores: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """A token drawn by temperature and top_p (Holtzman et al. 2020, arXiv 1904.09751, section 3.1)."""
    import torch

    shares, ids = (scores / sampling.temperature).softmax(-1).sort(descending=True)
    # the smallest set of likeliest tokens that reaches top_p: a token is in it if those before it do not
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= max(sampling.top_p, 1e-9), 0.0)
    return int(ids[torch.multinomial(shares, 1, generator=generator)])
