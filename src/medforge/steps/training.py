"""The steps that make a model: each stage of training, and the merge of their adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medforge.config import RunConfig
from medforge.steps.common import Metrics, checkpoints, log, seeing
from medforge.steps.settings import read
from medforge.workspace import Step, run_step


def train(
    config: str, stage: str, model: str, dataset: str, before: str, adapters: str, logs: str, metrics: Metrics
) -> None:
    """Train one stage on top of the stack `before` ("" for the first) and write the longer stack to `adapters`."""
    run = read(config, "train", stage)

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.train import Inputs
        from medforge.train import run as run_stage

        given = Inputs(Path(model), Path(dataset), Path(before) if before else None)
        wanted, kept = run.stage(stage), checkpoints(run)
        about = run_stage(given, out["adapters"], scratch, out["logs"], wanted, run.model, run.seed, run.parallel, kept)
        return _trained(about)

    log(metrics, run_step(_training(run, stage, model, dataset, before, adapters, logs), body))


def train_nodes(
    config: str,
    stage: str,
    nodes: str,
    model: str,
    dataset: str,
    before: str,
    adapters: str,
    logs: str,
    metrics: Metrics,
) -> None:
    """Do as `train` on several machines of the cluster that this runs in; `nodes` says how their pods are."""
    run = read(config, "train", stage)

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        import os

        from medforge.rollout.kubeconfig import find
        from medforge.storage import connect
        from medforge.train import Inputs, trainjob
        from medforge.train.stage import job_of, told

        given = Inputs(Path(model), Path(dataset), Path(before) if before else None)
        job = job_of(
            given,
            out["adapters"],
            scratch,
            out["logs"],
            run.stage(stage),
            run.model,
            run.seed,
            run.parallel,
            checkpoints(run),
        )
        with connect(create=False) as store:
            trainjob.run(find(os.environ), store, job, nodes)
        return _trained(told(job))

    log(metrics, run_step(_training(run, stage, model, dataset, before, adapters, logs), body))


def _training(run: RunConfig, stage: str, model: str, dataset: str, before: str, adapters: str, logs: str) -> Step:
    """The step that trains a stage, on however many machines."""
    inputs = {"model": Path(model), "dataset": Path(dataset)} | ({"before": Path(before)} if before else {})
    settings = {
        "stage": run.stage(stage).decisive(),
        "model": seeing(run),
        "dtype": run.model.dtype,
        "seed": run.seed,
    }
    outputs = {"adapters": Path(adapters), "logs": Path(logs)}
    return Step("train", f"train-{stage}", inputs, settings, outputs, logs=frozenset({"logs"}))


def _trained(about: Mapping[str, Any]) -> dict[str, Any]:
    """What of a stage's stage.json is shown beside the step."""
    return {name: about[name] for name in ("steps", "best_step", "trainable_parameters")} | about["validation"]


def merge(config: str, model: str, adapters: str, dataset: str, merged: str, metrics: Metrics) -> None:
    """Write the base with all adapters merged to `merged`, with the proof that both say the same."""
    run = read(config, "merge")
    inputs = {"model": Path(model), "adapters": Path(adapters), "dataset": Path(dataset)}
    settings = {"model": seeing(run), "dtype": run.model.dtype}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.merge import run as run_merge

        proof = run_merge(Path(model), Path(adapters), Path(dataset), out["merged"], run.model)
        return {name: proof[name] for name in ("max_logit_difference", "max_logit", "same_best_token")}

    log(metrics, run_step(Step("merge", "merge", inputs, settings, {"merged": Path(merged)}), body))
