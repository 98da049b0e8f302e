"""One stage, from its inputs to the longer stack of adapters.

Only answer tokens carry loss. A stage that was killed goes on from its newest whole checkpoint, on any number of
processes, and ends with the adapter of an unbroken run.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from medforge.config import CheckpointConfig, ModelConfig, ParallelConfig, StageConfig
from medforge.files import link_tree, new_folder, read_json, tree_digest, write_json
from medforge.models.determinism import seeded
from medforge.train.job import Inputs, Job
from medforge.train.prepare import Material, build, feature_folder, read

# how long uploads may hold up the end: less than a pod's grace after SIGTERM, and a good while when all is done
_STOPPED_SECONDS, _FINISHED_SECONDS = 15.0, 600.0


def run(
    inputs: Inputs,
    out: Path,
    work: Path,
    logs: Path,
    stage: StageConfig,
    model_config: ModelConfig,
    seed: int,
    parallel: ParallelConfig | None = None,
    checkpoints: CheckpointConfig | None = None,
) -> dict[str, Any]:
    """Train `stage` and write the stack, with its adapter added, to the folder `out`.

    `work` keeps checkpoints, `logs` the TensorBoard files and progress.jsonl. Returns the content of the adapter's
    stage.json: settings, digests of base, data and earlier adapters, the best step and its figures, and the curves.

    Raises ValueError when the data set has no training samples, an entry of `stage.tune` is not in the model, the loss
    is not finite, or memory runs out; SystemExit(143) after SIGTERM, with a checkpoint written.
    """
    job = job_of(inputs, out, work, logs, stage, model_config, seed, parallel, checkpoints)
    if job.parallel.nodes > 1:
        raise ValueError(f"parallel.nodes: {job.parallel.nodes} machines take a cluster; this is one machine")
    if job.parallel.processes > 1:
        from medforge.train.launch import launch

        launch(job)
    else:
        train(job)
    return told(job)


def told(job: Job) -> dict[str, Any]:
    """The content of the stage.json of a job that is done."""
    return dict(read_json(job.out / f"{len(job.before) + 1:02d}-{job.stage.name}" / "stage.json"))


def job_of(
    inputs: Inputs,
    out: Path,
    work: Path,
    logs: Path,
    stage: StageConfig,
    model_config: ModelConfig,
    seed: int,
    parallel: ParallelConfig | None = None,
    checkpoints: CheckpointConfig | None = None,
) -> Job:
    """The job that `run` does with these arguments."""
    return Job(
        base=inputs.base,
        dataset=inputs.dataset,
        adapters=inputs.adapters,
        out=out,
        work=work,
        logs=logs,
        features=feature_folder(work),
        stage=stage,
        model=model_config,
        parallel=parallel or ParallelConfig(),
        checkpoints=checkpoints or CheckpointConfig(),
        seed=seed,
    )


def train(job: Job) -> None:
    """The work of one process of the stage. Process 0 writes."""
    from medforge import checkpoints
    from medforge.train import board, loop, parallel, throughput
    from medforge.train.adapters import parameter_groups
    from medforge.train.validation import Validation

    material = read(job)
    world = parallel.start()
    chief = world.rank == 0
    with seeded(job.seed):
        trainee, targets, speed = build(job, material, world.device)
        trainable = sum(p.numel() for p in trainee.model.parameters() if p.requires_grad)
        size = throughput.Size.of(trainee.stock)
        groups = parameter_groups(trainee, targets, job.stage)
        engine = parallel.engine(trainee, groups, job.parallel, world, job.stage.max_grad_norm)
        if chief:
            print(f"{job.stage.name}: {material.plan.steps} steps\n{speed.explain()}", flush=True)
        identity = job.identity(material.data_digest)
        url = f"{job.checkpoints.url.rstrip('/')}/{job.stage.name}-{identity[:16]}" if job.checkpoints.url else None
        say = print if chief else lambda *_: None
        fetches = world.local_rank == 0  # one process of each machine: the disk is the machine's
        kept = checkpoints.Checkpoints(job.work / "checkpoints", job.checkpoints.keep, url if fetches else None, say)
        state = _resume(job, kept, engine, identity, world)
        shown = board.Board(
            job.logs, job.stage.name, material.plan.steps, state.step, lambda: throughput.peak_memory(world.device)
        ) if chief else None  # fmt: skip
        validation = Validation(job.stage, material.held_out, engine, world, speed, job.seed)

        def validate(step: int) -> dict[str, float]:
            return validation.run(lambda answers: shown.answers(step, answers) if shown else None)

        def save(state: loop.State, best: bool) -> None:
            tensors = engine.state()
            if chief:
                kept.save(state.step, tensors, {"identity": identity, **asdict(state)}, best=best)

        parts = loop.Parts(
            engine=engine,
            world=world,
            plan=material.plan,
            samples=material.train,
            speed=speed,
            peaks=[group["lr"] for group in groups],
            meter=throughput.Meter(throughput.device_peak(world.device, job.model.dtype)),
            size=size,
            work=job.work,
            validate=validate if len(material.held_out) else None,
            save=save,
            report=shown.report if shown else lambda *_: None,
        )
        grace = _STOPPED_SECONDS
        try:
            state = loop.train(job.stage, parts, state, job.seed)
            grace = _FINISHED_SECONDS
        finally:
            if shown:
                shown.close()
            if chief:
                kept.close(grace)
        if chief:
            _write(job, material, trainee, kept, state, trainable)
    parallel.stop(world)


def _resume(job: Job, kept: Any, engine: Any, identity: str, world: Any) -> Any:
    """The state of the newest checkpoint of the same job, its weights put in place; a new state without one.

    Process 0 says which; one process of each other machine fetches it, and where one cannot, an older one is taken.
    """
    from medforge.train.loop import State

    chief = world.rank == 0
    unfit: set[int] = set()

    def fits(state: Any) -> bool:
        return bool(state.get("identity") == identity and state["step"] not in unfit)

    while True:
        found = kept.latest(fits) if chief else None
        while found is not None and not _has_best(kept, found):
            print(
                f"{job.stage.name}: the best checkpoint before step {found.step} is gone: it is made again", flush=True
            )
            unfit.add(found.step)
            found = kept.latest(fits)
        step = engine.most(found.step if found else 0)  # the others wait for what process 0 may have to fetch
        if not step:
            return State()
        if not chief:
            found = _fetched(kept, fits, step, engine, world)
        else:
            engine.most(0)
        if not engine.any(found is None):
            break
        unfit.add(step)
    assert found is not None and found.step == step
    engine.load_state({name: found.tensors(name) for name in ("weights", "exp_avg", "exp_avg_sq", "step")})
    values = {name: value for name, value in found.state.items() if name != "identity"}
    values["unlogged"] = [tuple(pair) for pair in values["unlogged"]]
    if chief:
        print(f"{job.stage.name}: goes on after step {step}", flush=True)
    return State(**values)


def _fetched(kept: Any, fits: Any, step: int, engine: Any, world: Any) -> Any:
    """The checkpoint of `step`, which the first process of a machine fetches to it; None if it cannot be had."""

    def wanted(state: Any) -> bool:
        return bool(fits(state) and state["step"] == step)

    here = kept.latest(wanted, fetch=False)
    if here is None and world.local_rank == 0:
        here = kept.latest(wanted)
    engine.most(0)  # the others of this machine wait for it
    return here or kept.latest(wanted, fetch=False)


def _has_best(kept: Any, found: Any) -> bool:
    """Whether the best checkpoint up to `found`, which may be the stage's result, is at hand. It is fetched if need be.

    Going on without it could end without a result: steps after it need not better it.
    """
    wanted = found.state["best_step"]
    if wanted in (None, found.step):
        return True
    best = kept.best()
    return best is not None and best.step == wanted


def _write(job: Job, material: Material, trainee: Any, kept: Any, state: Any, trainable: int) -> None:
    """The longer stack, with the weights of the best step, or of the last one where there is no validation."""
    from medforge.train.adapters import save

    validated = state.best is not None
    found = kept.best(fetch=False) if validated else kept.latest(fetch=False)
    wanted = state.best_step if validated else state.step
    curves = [dict(sorted(row.items())) for row in state.curves]  # a resumed run has read its rows in another order
    if found is None or found.step != wanted:
        raise ValueError(
            f"{job.work}: the checkpoint of step {wanted}, which is the result, could not be written or is gone; make "
            "room and run the stage again: it goes on from the newest checkpoint that is whole"
        )
    before = job.before
    about = {
        "schema_version": 2,
        "stage": job.stage.model_dump(),
        "seed": job.seed,
        "base": tree_digest(job.base),
        "data": material.data_digest,
        "before": {path.name: tree_digest(path) for path in before},
        "trainable_parameters": trainable,
        "samples": {"train": len(material.train), "validation": len(material.held_out)},
        "steps": state.step,
        "best_step": wanted,
        "best_by": job.stage.best_by if validated else "last step (the data set has no validation split)",
        "eval_loss": _figure(curves, wanted, "eval_loss"),
        "validation": _figures(curves, wanted),
        "curves": curves,
    }
    with new_folder(job.out) as folder:
        for path in before:
            link_tree(path, folder / path.name)
        adapter = folder / f"{len(before) + 1:02d}-{job.stage.name}"
        save(trainee, found.tensors("weights"), job.stage, adapter)
        write_json(adapter / "stage.json", about)
        plot_curves(curves, job.stage.name, adapter / "curves.png")


def _figures(curves: list[dict[str, float]], step: int) -> dict[str, float]:
    """The validation's figures after a step."""
    rows = [row for row in curves if row["step"] == step and "eval_loss" in row]
    return {n.removeprefix("eval_"): v for row in rows for n, v in row.items() if n.startswith("eval_")}


def _figure(curves: list[dict[str, float]], step: int, name: str) -> float | None:
    return next((row[name] for row in curves if row["step"] == step and name in row), None)


def plot_curves(curves: list[dict[str, float]], name: str, path: Path) -> None:
    """Training and validation loss against the step, and what else validation measures beside them, as a PNG."""
    from matplotlib.figure import Figure

    shares = sorted({key for row in curves for key in row if key.endswith(("accuracy", "_iou", "_auroc"))})
    figure = Figure(figsize=(10 if shares else 6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if shares else 1, squeeze=False)[0]
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        _plot(axes[0], curves, key, label, style)
    axes[0].set(title=f"Stage {name}", xlabel="step", ylabel="loss (nats a token)")
    for key in shares:
        _plot(axes[1], curves, key, key.removeprefix("eval_").replace("_", " "), "o-")
    if shares:
        axes[1].set(title="Validation", xlabel="step", ylabel="share", ylim=(0, 1.02))
    for plot in axes:
        plot.grid(alpha=0.3)
        plot.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _plot(axes: Any, curves: list[dict[str, float]], key: str, label: str, style: str) -> None:
    points = [(row["step"], row[key]) for row in curves if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
