"""Which samples each optimizer step takes: decided by the seed alone, whatever takes part in the step.

The epochs are laid end to end and cut into steps. Step n's samples follow from (seed, n), so that a resumed run goes
on in the same order, with any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from medforge.stages import StageConfig


class Plan:
    """The steps of a stage.

    `groups` names each sample's images, `weights` how often an epoch takes it, `tokens(index)` its length: asked only
    where `batch_tokens` is set.
    """

    def __init__(
        self,
        stage: StageConfig,
        groups: Sequence[Hashable],
        weights: Sequence[float],
        seed: int,
        tokens: Callable[[int], int],
    ) -> None:
        self.stage, self.seed, self.tokens = stage, seed, tokens
        self.groups, self.weights = list(groups), np.asarray(weights, dtype=np.float64)
        self._whole = np.floor(self.weights + 1e-9).astype(np.int64)
        self._share = np.clip(self.weights - self._whole, 0.0, 1.0)  # a sum of views may miss a whole by rounding
        self._drawn = round(float(self._share.sum()))
        self.epoch_size = int(self._whole.sum()) + self._drawn
        if not self.epoch_size:
            raise ValueError(f"stage {stage.name!r}: mix: the weights leave no sample for an epoch; raise them")
        # questions of one image are alike, so a step has to mix at least four images
        most = stage.batch_size // 4 if stage.batch_tokens is None else stage.speed.questions_per_image
        self.run = max(1, min(stage.speed.questions_per_image, most))
        self._epochs: dict[int, np.ndarray] = {}
        self._cuts = [0]  # where each step starts in the run of epochs
        self.steps = stage.steps or self._count(float(stage.epochs or 0))

    def _count(self, epochs: float) -> int:
        samples = max(1, round(epochs * self.epoch_size))
        if self.stage.batch_tokens is None:
            return math.ceil(samples / self.stage.batch_size)
        steps = 0
        while self._start(steps) < samples:
            steps += 1
        return steps

    @property
    def taken(self) -> int:
        """Samples that all steps take."""
        return self._start(self.steps)

    def rows_in_epoch(self) -> int:
        """Into how many runs of questions of one image an epoch falls, about."""
        held: dict[Hashable, float] = {}
        for group, weight in zip(self.groups, self.weights.tolist(), strict=True):
            held[group] = held.get(group, 0.0) + weight
        return sum(math.ceil(count / self.run) for count in held.values())

    def step(self, number: int) -> list[int]:
        """The samples of step `number`, counted from 0. One may stand twice where an epoch ends."""
        first, last = self._start(number), self._start(number + 1)
        return [self._at(place) for place in range(first, last)]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.epoch_size)
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = self.epoch(epoch)
        return int(self._epochs[epoch][offset])

    def _start(self, number: int) -> int:
        if self.stage.batch_tokens is None:
            return number * self.stage.batch_size
        while len(self._cuts) <= number:
            place, held = self._cuts[-1], 0
            while held == 0 or held + self.tokens(self._at(place)) <= self.stage.batch_tokens:
                held += self.tokens(self._at(place))
                place += 1
            self._cuts.append(place)
        return self._cuts[number]

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """As many samples as the fractions add up to, none twice, each with the chance that its fraction says.

        Systematic sampling in a drawn order (Madow 1949): the fractions are laid end to end, and marks at a distance of
        1 pick those that they fall on. The first mark is drawn from where the marks are as many as are wanted.
        """
        order = rng.permutation(np.flatnonzero(self._share))
        ends = np.cumsum(self._share[order])
        over = self._drawn - float(ends[-1])
        offset = rng.uniform(max(0.0, over), min(1.0, over + 1.0))
        places = np.searchsorted(ends, np.arange(1, self._drawn + 1) - offset)
        return np.asarray(order[np.minimum(places, len(order) - 1)])

    def epoch(self, number: int) -> np.ndarray:
        """The samples of an epoch in their order.

        Questions of an image come in runs of at most `questions_per_image`, drawn anew each epoch, so that they can
        share a row; the runs are shuffled.
        """
        rng = np.random.default_rng([self.seed, number])
        taken = np.repeat(np.arange(len(self.groups)), self._whole)
        if self._drawn:
            taken = np.concatenate([taken, np.sort(self._draw(rng))])
        taken = rng.permutation(taken)
        if self.run == 1:
            return taken
        by_group: dict[Hashable, list[int]] = {}
        for index in taken.tolist():
            by_group.setdefault(self.groups[index], []).append(index)
        runs = [
            group[start : start + self.run] for group in by_group.values() for start in range(0, len(group), self.run)
        ]
        return np.asarray([index for place in rng.permutation(len(runs)).tolist() for index in runs[place]])
