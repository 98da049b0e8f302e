"""Validation while a stage runs: the loss of the answers, real answers by generation, and the heads' figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from medforge.metrics import correct
from medforge.metrics.boxes import iou
from medforge.metrics.ranking import auroc
from medforge.models.claims import claimable, wrong_answers
from medforge.models.generate import answer_boxes, answer_text, generate, read_boxes, region_target
from medforge.models.rows import Item, collate_rows, cut
from medforge.records import Sample
from medforge.stages import StageConfig
from medforge.train.data import Samples
from medforge.train.memory import advised, sizes
from medforge.train.speed import Speed
from medforge.train.trainee import Goal, Trainee, Work

_SHOWN = 8  # answers in TensorBoard
_AT_ONCE = 16  # prompts generated together, where micro_tokens has room for them

Answers = list[tuple[str, str, str, Sequence[Any]]]


def asked(stage: StageConfig, count: int) -> list[int]:
    """Which of a stage's `count` validation samples are answered by generation."""
    # spread over the split, since neighbours are questions of one image
    step = max(1, count // max(1, stage.generate_samples))
    return list(range(0, count, step))[: stage.generate_samples]


def figures(stage: StageConfig, samples: Sequence[Sample], seed: int) -> list[str]:
    """The names of the figures that a validation on `samples` gives."""
    types = {samples[index].answer_type for index in asked(stage, len(samples))}
    found = ["loss", "perplexity", *(["accuracy"] if types else []), *(f"{kind}_accuracy" for kind in sorted(types))]
    if stage.heads and stage.heads.region and any(region_target(sample) is not None for sample in samples):
        found.append("region_iou")
    if stage.heads and stage.heads.match:
        wrong = wrong_answers(samples, seed)
        if any(answer is not None and claimable(s) for s, answer in zip(samples, wrong, strict=True)):
            found.append("match_auroc")
    return found


class Validation:
    """The fixed validation samples of a stage: prepared once, run at intervals.

    Figures are those of all processes together: each takes its share of the work, but for ZeRO-3, where all run all.
    """

    def __init__(self, stage: StageConfig, samples: Samples, engine: Any, world: Any, speed: Speed, seed: int) -> None:
        self.stage, self.samples, self.engine, self.world, self.speed = stage, samples, engine, world, speed
        self.asked = asked(stage, len(samples))
        longest = max((samples.item(index).encoded.length for index in self.asked), default=1)
        self.at_once = max(1, min(_AT_ONCE, stage.micro_tokens // longest))
        self.items = self._items(seed)

    def _items(self, seed: int) -> list[Item]:
        heads, found = self.stage.heads, []
        everything = range(len(self.samples))
        for index in everything:
            box = region_target(self.samples.samples[index]) if heads and heads.region else None
            found.append(replace(self.samples.item(index), tag=Goal(index, box)))
        if heads and heads.match:
            wrong = wrong_answers(self.samples.samples, seed)
            for index, sample, answer in zip(everything, self.samples.samples, wrong, strict=True):
                if answer is not None and claimable(sample):
                    found.append(self.samples.claim(index, sample.answer, Goal(index, fits=True)))
                    found.append(self.samples.claim(index, answer, Goal(index, fits=False)))
        return found

    def run(self, show: Callable[[Answers], None]) -> dict[str, float]:
        """The figures: loss (nats a token), perplexity, accuracy by answer type, region_iou, match_auroc.

        A figure that no sample bears is absent. `show` gets some answers, in process 0.
        """
        import torch

        module: Trainee = self.engine.module
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            with torch.no_grad():
                figures = self._scored()
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=module.dtype == "bfloat16"):
                    figures |= self._answered(show)
        finally:
            for part, training in modes:
                part.training = training
        return figures

    def _mine(self, things: Sequence[Any]) -> list[Any]:
        if self.engine.whole_forward:
            return list(things)
        return [thing for number, thing in enumerate(things) if number % self.world.size == self.world.rank]

    def _sum(self, values: Sequence[float]) -> list[float]:
        return list(values) if self.engine.whole_forward else self.engine.total(values)

    def _scored(self) -> dict[str, float]:
        encoder, speed = self.samples.encoder, self.speed
        merge = encoder.image_processor.merge_size
        micro = cut(
            self.items, encoder.image_id, merge, self.stage.micro_tokens, speed.share_prefix, True, speed.packed
        )
        nll = tokens = overlap = boxes = 0.0
        scores: list[tuple[bool, float]] = []
        for number, rows in self._mine(list(enumerate(micro))):
            batch = collate_rows(rows, encoder.image_id, encoder.pad_id, speed.packed)
            work = Work(number, batch, self.engine.module.features.ready(batch, self.samples.pixels))
            with advised(self.stage, "validating", *sizes([batch])):
                _, sums, seen = self.engine(work, work.counts, outputs=True)
            nll += float(sums["language"])
            tokens += len(batch.targets)
            for goal, box, score in zip((item.tag for item in batch.items), seen["boxes"], seen["scores"], strict=True):
                if goal.box is not None:
                    overlap, boxes = overlap + iou(tuple(box), goal.box), boxes + 1
                if goal.fits is not None:
                    scores.append((goal.fits, score))
        nll, tokens, overlap, boxes = self._sum([nll, tokens, overlap, boxes])
        figures = {"loss": nll / tokens, "perplexity": math.exp(min(700.0, nll / tokens))}
        if boxes:
            figures["region_iou"] = overlap / boxes
        scores = self._gather(scores)
        area = auroc([s for fits, s in scores if fits], [s for fits, s in scores if not fits])
        return figures if area is None else figures | {"match_auroc": area}

    def _gather(self, rows: list[Any]) -> list[Any]:
        """The rows of all processes, in every process."""
        if self.world.size == 1 or self.engine.whole_forward:
            return rows
        import torch.distributed as dist

        everyone: list[list[Any]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, rows)
        return [row for part in everyone for row in part]

    def _answered(self, show: Callable[[Answers], None]) -> dict[str, float]:
        model, encoder = self.engine.module.model, self.samples.encoder
        extra = {"synced_gpus": True} if self.engine.whole_forward else {}
        right = {"open": 0.0, "closed": 0.0}
        count = {"open": 0.0, "closed": 0.0}
        shown: Answers = []
        for indexes in _chunks(self._mine(self.asked), self.at_once):
            prompts = self.samples.prompts(indexes)
            longest = max(prompt.length for prompt in prompts)
            with advised(self.stage, "generating after", longest * len(prompts), longest, longest):
                answers = generate(model, encoder, prompts, self.stage.max_new_tokens, **extra)
            for index, prompt, answer in zip(indexes, prompts, answers, strict=True):
                sample = self.samples.samples[index]
                reference = answer_text(sample, encoder.family, prompt.sizes)
                boxes = read_boxes(answer.text, sample, encoder.family, prompt.sizes)
                wanted = answer_boxes(sample)
                is_right = correct(sample.question, reference, answer.text, sample.answer_type, wanted, boxes)
                right[sample.answer_type] += is_right
                count[sample.answer_type] += 1
                if len(shown) < _SHOWN and self.world.rank == 0:
                    shown.append((sample.question, reference, answer.text, self.samples.decoded(index)))
        kinds = list(right)
        summed = self._sum([*right.values(), *count.values()])
        right, count = dict(zip(kinds, summed[:2], strict=True)), dict(zip(kinds, summed[2:], strict=True))
        if shown:
            show(shown)
        figures = {f"{kind}_accuracy": right[kind] / count[kind] for kind in kinds if count[kind]}
        total = sum(count.values())
        return figures | {"accuracy": sum(right.values()) / total} if total else figures


def _chunks(things: Sequence[int], size: int) -> Iterable[list[int]]:
    for start in range(0, len(things), size):
        yield list(things[start : start + size])
