"""The training loop: micro-batches to gradients to steps, with validation, checkpoints and a way out of trouble.

A step's samples, its order and its random numbers follow from (seed, step); what is random in a micro-batch (dropout)
from (seed, step, micro-batch). So a resumed run, also with another number of processes, does what the unbroken one
would have done.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medforge.files import write_json
from medforge.models.rows import collate_rows, cut
from medforge.stages import StageConfig
from medforge.train.data import Samples
from medforge.train.memory import advised, sizes
from medforge.train.plan import Plan
from medforge.train.speed import Speed
from medforge.train.throughput import Meter, counts_of, flops
from medforge.train.trainee import Work, items_of, normalisers

_AHEAD = 2  # steps that are prepared while one runs
EXPLODED = 10.0  # times the usual loss (at least a nat): the stage stops
_USUAL = 50  # steps that make the usual loss
_REMEDY = "Lower learning_rate or max_grad_norm, or lengthen warmup"


class Stopped(SystemExit):
    """SIGTERM: a checkpoint is written, the process ends with 143 as its sender expects."""

    def __init__(self) -> None:
        super().__init__(143)


@dataclass
class State:
    """What a resumed run has to know besides weights and the optimizer's state."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    without_gain: int = 0
    curves: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    unlogged: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """What the loop drives. `validate(step)` gives the figures of a validation, or None without such a split."""

    engine: Any
    world: Any
    plan: Plan
    samples: Samples
    speed: Speed
    peaks: list[float]
    meter: Meter
    size: Any
    work: Path
    validate: Callable[[int], dict[str, float]] | None
    save: Callable[[State, bool], None]
    report: Callable[[int, Mapping[str, float]], None]
    tasks: dict[str, float] = field(default_factory=dict)  # the heads' mean losses in the last step


def train(stage: StageConfig, parts: Parts, state: State, seed: int) -> State:
    """Take the steps that are left and return the state at the end. `state` is changed in place.

    Raises ValueError for a loss or gradient that is not finite or has exploded (the samples are written to the work
    folder), and for a lack of memory; Stopped after SIGTERM.
    """
    plan, engine, world = parts.plan, parts.engine, parts.world
    every = stage.checkpoint_every or stage.evaluate_every
    log_every = max(n for n in range(1, min(10, stage.evaluate_every, plan.steps) + 1) if stage.evaluate_every % n == 0)
    if _is_due(stage, parts, state.step) and all(
        "eval_loss" not in row for row in state.curves if row["step"] == state.step
    ):
        parts.save(state, _validate(stage, parts, state, state.step))  # the run was stopped before it could
    if stage.patience is not None and state.without_gain >= stage.patience:
        return state
    with _terminated() as stop, Ahead(stage, parts, seed, state.step) as ahead:
        for step in range(state.step, plan.steps):
            works = ahead.take(step)
            rates = [peak * factor(stage, step, plan.steps) for peak in parts.peaks]
            with advised(stage, "training on", *sizes([work.batch for work in works])):
                loss, norm = one_step(parts, works, seed, step, rates)
            guard(parts, stage, state, step, loss, norm)
            state.step = done = step + 1
            state.losses = [*state.losses[1 - _USUAL :], loss]
            state.unlogged.append((loss, norm))
            if done % log_every == 0 or done == plan.steps:
                means = [sum(column) / len(column) for column in zip(*state.unlogged, strict=True)]
                row = {"step": done, "loss": means[0], "grad_norm": means[1], "learning_rate": rates[0]}
                state.unlogged = []
                state.curves.append(row)
                parts.report(done, row | parts.tasks | parts.meter.read(world.size))
            last = done == plan.steps
            stopping = engine.any(stop.is_set())
            better = False
            if _is_due(stage, parts, done) and not stopping:
                better = _validate(stage, parts, state, done)
            exhausted = stage.patience is not None and state.without_gain >= stage.patience
            if last or exhausted or stopping or better or done % every == 0:
                started = time.perf_counter()
                parts.save(state, better)
                parts.meter.leave_out(time.perf_counter() - started)
            if stopping:  # after the last step too: its validation is still to come
                raise Stopped
            if exhausted and not last:
                parts.report(done, {"stopped_early": float(done)})
                break
    return state


def _is_due(stage: StageConfig, parts: Parts, step: int) -> bool:
    """Whether a validation belongs after a step."""
    return bool(parts.validate and step and (step % stage.evaluate_every == 0 or step == parts.plan.steps))


def _validate(stage: StageConfig, parts: Parts, state: State, step: int) -> bool:
    """Validate, note the figures, and tell whether the best one was bettered."""
    assert parts.validate is not None
    started = time.perf_counter()
    figures = parts.validate(step)
    parts.meter.leave_out(time.perf_counter() - started)
    state.curves.append({"step": step} | {f"eval_{name}": value for name, value in figures.items()})
    parts.report(step, {f"eval_{name}": value for name, value in figures.items()})
    for name, value in figures.items():
        if not math.isfinite(value):  # else it could be the best one: nothing is better than NaN
            raise ValueError(
                f"stage {stage.name!r}: step {step}: the validation's {name} is {value}. Weights of before it are in "
                f"the last checkpoint. {_REMEDY}"
            )
    value = figures[stage.best_by]
    better = state.best is None or (value < state.best if stage.best_by == "loss" else value > state.best)
    if better:
        state.best, state.best_step, state.without_gain = value, step, 0
    else:
        state.without_gain += 1
    return better


def one_step(parts: Parts, works: list[Work], seed: int, step: int, rates: list[float]) -> tuple[float, float]:
    """One optimizer step. Returns the mean loss of the answers' tokens and the norm of the gradient before clipping."""
    import torch

    engine, world = parts.engine, parts.world
    mine = [work for work in works if work.number % world.size == world.rank]
    names = list(works[0].counts)
    totals = dict(zip(names, (sum(work.counts[name] for work in works) for name in names), strict=True))
    turns = engine.most(len(mine)) if engine.whole_forward else len(mine)
    told = dict.fromkeys(("language", "region", "match"), 0.0)
    for turn in range(turns):
        # ZeRO-3 gathers weights together: a process without work of its own runs along with none of its weight
        work, scale = (mine[turn], 1.0) if turn < len(mine) else (works[0], 0.0)
        torch.manual_seed(_seed(seed, step, work.number))
        share, sums = engine(work, totals, scale, once=work.number == 0 and scale > 0)
        engine.backward(share)
        for task, value in sums.items():
            told[task] += float(value) * scale
    norm = engine.step(rates)
    batches = [work.batch for work in mine]
    patches = sum(len(array) for work in mine if work.ready for array in work.ready.pixels.values())
    full = parts.speed.features is None or parts.plan.stage.method == "full"
    counts = counts_of(batches) | {"flops": sum(flops(parts.size, batch, 0, full) for batch in batches)}
    counts["flops"] += 2.0 * parts.size.tower * patches
    counts["samples"] = float(sum(item.tag.fits is None for batch in batches for item in batch.items))
    keys = list(counts)
    summed = engine.total([*told.values(), *(counts[key] for key in keys)])
    parts.meter.add(dict(zip(keys, summed[len(told) :], strict=True)))
    if heads := parts.plan.stage.heads:
        divisors = normalisers(totals, heads)
        means = {f"loss_{t}": value / divisors[t] for t, value in zip(told, summed, strict=False) if divisors[t]}
        parts.tasks.update(means)
    return summed[0] / totals["language"], float(norm)


def factor(stage: StageConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at a step, counted from 0: a linear warm-up, then the schedule."""
    warmup = math.ceil(stage.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1.0 - done if stage.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def guard(parts: Parts, stage: StageConfig, state: State, step: int, loss: float, norm: float) -> None:
    """Stop when the loss or the gradient is not finite, or the loss is far above what it was."""
    usual = max(1.0, sorted(state.losses)[len(state.losses) // 2]) if len(state.losses) >= _USUAL else math.inf
    if math.isfinite(loss) and math.isfinite(norm) and loss <= EXPLODED * usual:
        return
    what = f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}"
    if math.isfinite(loss) and math.isfinite(norm):
        what = f"the loss is {loss:.4g}, {loss / usual:.0f} times the usual {usual:.4g}"
    path = parts.work / f"bad-step-{step + 1:08d}.json"
    if parts.world.rank == 0:
        ids = [parts.samples.samples[index].id for index in parts.plan.step(step)]
        finite = {name: value if math.isfinite(value) else None for name, value in (("loss", loss), ("norm", norm))}
        write_json(path, {"step": step + 1, **finite, "samples": ids, "recent_losses": state.losses[-10:]})
    raise ValueError(
        f"stage {stage.name!r}: step {step + 1}: {what}; the step's samples are in {path}. Weights of before it are in "
        f"the last checkpoint. {_REMEDY}, or take out the samples"
    )


def _seed(seed: int, step: int, number: int) -> int:
    from medforge.files import sha256_json

    return int(sha256_json([seed, step, number])[:15], 16)


class Ahead:
    """Prepares steps in threads while others run: which samples, rows, tensors, pixels or kept features."""

    def __init__(self, stage: StageConfig, parts: Parts, seed: int, start: int) -> None:
        self.stage, self.parts, self.seed = stage, parts, seed
        self._pool = ThreadPoolExecutor(stage.speed.workers) if stage.speed.workers else None
        self._futures: dict[int, Future[list[Work]]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> list[Work]:
        """The micro-batches of a step, of all processes; those of others without what their images need."""
        if self._pool is None:
            return self.prepare(step, self.parts.plan.step(step))
        for following in range(step, min(step + 1 + _AHEAD, self.parts.plan.steps)):
            if following not in self._futures:
                # the plan is not made for several threads, so it is asked here
                chosen = self.parts.plan.step(following)
                self._futures[following] = self._pool.submit(self.prepare, following, chosen)
        return self._futures.pop(step).result()

    def prepare(self, step: int, chosen: list[int]) -> list[Work]:
        """Encode, cut and load one step."""
        speed, encoder, world = self.parts.speed, self.parts.samples.encoder, self.parts.world
        items = items_of(self.parts.samples, chosen, self.stage.heads, _seed(self.seed, step, -1))
        merge = encoder.image_processor.merge_size
        packed = speed.packed
        micro = cut(
            items, encoder.image_id, merge, self.stage.micro_tokens, speed.share_prefix, speed.length_buckets, packed
        )
        found = []
        features = self.parts.engine.module.features
        whole = self.parts.engine.whole_forward
        for number, rows in enumerate(micro):
            batch = collate_rows(rows, encoder.image_id, encoder.pad_id, packed)
            wanted = number % world.size == world.rank or (whole and number == 0)
            found.append(Work(number, batch, features.ready(batch, self.parts.samples.pixels) if wanted else None))
        return found


@contextmanager
def _terminated() -> Iterator[Any]:
    """An event that SIGTERM sets while the block runs; what handled the signal before does so again afterwards."""
    import threading

    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
