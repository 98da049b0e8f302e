"""What is trained: the language model with its adapters and, in a multi-task stage, the heads. One module, one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from medforge.models.claims import claimable, wrong_answers
from medforge.models.forward import answer_losses, hidden_states
from medforge.models.generate import region_target
from medforge.models.heads import TASKS, TaskHeads, match_loss, penalty, region_loss, task_weights
from medforge.models.rows import Batch, Item
from medforge.stages import HeadsConfig
from medforge.train.data import Samples
from medforge.train.features import Features, Ready

Sums = dict[str, float]


@dataclass(frozen=True)
class Goal:
    """What an item is for, besides its own answer: the sample, its box (xyxy, 0–1), and whether its claim fits."""

    index: int
    box: tuple[float, float, float, float] | None = None
    fits: bool | None = None


@dataclass(frozen=True)
class Work:
    """A micro-batch. `number` counts those of its step, over all processes; `ready` is None for another process's."""

    number: int
    batch: Batch
    ready: Ready | None

    @property
    def counts(self) -> Sums:
        """By how much each task's loss is to be divided, before the sum over the step: tokens, boxes, and claims."""
        goals = [item.tag for item in self.batch.items]
        return {
            "language": float(len(self.batch.targets)),
            "region": float(sum(goal.box is not None for goal in goals)),
            "match_true": float(sum(goal.fits is True for goal in goals)),
            "match_false": float(sum(goal.fits is False for goal in goals)),
        }


def items_of(samples: Samples, indexes: list[int], heads: HeadsConfig | None, seed: int) -> list[Item]:
    """The items of a step: the samples, and with a match head one claim for each that can bear one.

    Whether a claim is the sample's own answer or a wrong one from the same step is drawn; a sample to whose question
    no answer of the step is certainly wrong gets none, so that the head cannot learn the question by itself.
    """
    from dataclasses import replace

    import numpy as np

    items = []
    for index in indexes:
        box = region_target(samples.samples[index]) if heads and heads.region else None
        items.append(replace(samples.item(index), tag=Goal(index, box)))
    if heads and heads.match:
        chosen = [samples.samples[index] for index in indexes]
        fits = np.random.default_rng(seed).random(len(indexes)) < 0.5
        for index, sample, wrong, fit in zip(indexes, chosen, wrong_answers(chosen, seed), fits, strict=True):
            if wrong is not None and claimable(sample):
                items.append(samples.claim(index, sample.answer if fit else wrong, Goal(index, fits=bool(fit))))
    return items


class Trainee(torch.nn.Module):
    """The model and its heads. `forward` gives a micro-batch's share of the optimizer step's loss."""

    def __init__(
        self,
        model: Any,
        heads: TaskHeads | None,
        features: Features,
        config: HeadsConfig | None,
        dtype: str,
        device: Any,
        answer_logits: bool = True,
        flex: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.heads = model, heads
        self.features, self.config, self.dtype, self.device = features, config, dtype, device
        self.answer_logits, self.flex = answer_logits, flex
        self.in_step = False  # ZeRO-3: all processes run the same modules, with or without use for them

    @property
    def stock(self) -> Any:
        """The Hugging Face model, without peft's wrapper around it."""
        return self.model.base_model.model if hasattr(self.model, "peft_config") else self.model

    def forward(
        self,
        work: Work,
        totals: Mapping[str, float],
        scale: float = 1.0,
        once: bool = False,
        outputs: bool = False,
    ) -> tuple[Any, ...]:
        """The share (a scalar to be added up over the step), and the sums of each task's losses, without gradient.

        `totals` are the step's counts over all micro-batches and processes. `once` adds what is counted once a step.
        With `outputs`, also what the heads say of each item: {"boxes": xyxy, 0–1, "scores": logits} as lists.
        """
        assert work.ready is not None
        device = self.device
        batch = work.batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            levels = self.features.levels(batch, work.ready, device)
            idle = self.features.nothing(device) if self.in_step and not levels else 0.0
            hidden = hidden_states(self.stock, batch, levels, self.flex)
            losses = {"language": answer_losses(self.stock, hidden, batch, self.answer_logits).sum()}
        if self.heads is not None:
            losses |= self._head_losses(batch, hidden.flatten(0, 1))
        losses["language"] = losses["language"] + idle
        share = self._join(losses, totals, once) * scale
        if torch.is_grad_enabled() and not share.requires_grad:
            # only texts, in a stage that tunes the vision alone: their backward has nothing to do, and is no error
            share = share.detach().requires_grad_()
        sums = {name: loss.detach() for name, loss in losses.items()}
        return (share, sums, self._outputs(batch, hidden.flatten(0, 1))) if outputs else (share, sums)

    def _outputs(self, batch: Batch, hidden: torch.Tensor) -> dict[str, list[Any]]:
        none = [None] * len(batch.items)
        if self.heads is None or self.config is None:
            return {"boxes": none, "scores": none}
        from medforge.models.heads import to_xyxy

        pooled = hidden[batch.taps].float()
        return {
            "boxes": to_xyxy(self.heads.region(pooled)).tolist() if self.config.region else none,
            "scores": self.heads.match(pooled).tolist() if self.config.match else none,
        }

    def _head_losses(self, batch: Batch, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.heads is not None and self.config is not None
        goals = [item.tag for item in batch.items]
        losses = {}
        if found := [place for place, goal in enumerate(goals) if goal.box is not None]:
            pooled = hidden[batch.taps[found]].float()
            target = torch.tensor([goals[place].box for place in found], device=pooled.device)
            losses["region"] = region_loss(self.heads.region(pooled), target).sum()
        elif self.in_step and self.config.region:
            losses["region"] = self.heads.region(hidden[:1].float()).sum() * 0.0
        if claims := [place for place, goal in enumerate(goals) if goal.fits is not None]:
            pooled = hidden[batch.taps[claims]].float()
            fits = torch.tensor([float(goals[place].fits) for place in claims], device=pooled.device)
            weighed, _ = match_loss(self.heads.match(pooled), fits, self.config.missed_weight, self.config.gamma)
            losses["match"] = weighed.sum()
        elif self.in_step and self.config.match:
            losses["match"] = self.heads.match(hidden[:1].float()).sum() * 0.0
        return losses

    def _join(self, losses: dict[str, torch.Tensor], totals: Mapping[str, float], once: bool) -> torch.Tensor:
        if self.heads is None or self.config is None:
            return losses["language"] / totals["language"]
        divisors = normalisers(totals, self.config)
        present = {name for name, total in divisors.items() if total}
        weights = dict.fromkeys(TASKS, 1.0) | {str(task): weight for task, weight in self.config.weights.items()}
        factors = task_weights(self.heads, self.config.weighting, weights, present)
        joined = sum(
            (factors[name] * loss / divisors[name] for name, loss in losses.items() if name in present),
            start=torch.zeros((), device=losses["language"].device),
        )
        if once and self.config.weighting == "uncertainty":
            joined = joined + penalty(self.heads, present)
        return joined


def normalisers(totals: Mapping[str, float], config: HeadsConfig) -> Sums:
    """What each task's sum is divided by; 0 for a task that is absent from the step."""
    match = config.missed_weight * totals["match_true"] + totals["match_false"]
    return {"language": totals["language"], "region": totals["region"], "match": match}
