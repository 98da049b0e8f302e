"""The steps of the pipeline: what a component calls. Each takes the run's configuration as JSON and paths as text.

A step reads its part of the configuration, does the work through `workspace.run_step`, and logs a few figures to
`metrics`, an object with `log_metric(name, value)` (Kubeflow's Metrics artifact).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from medforge.config import CheckpointConfig, RunConfig, parse_config
from medforge.files import read_json, sha256_json, tree_digest, write_json
from medforge.workspace import Step, code_version, run_step


class Metrics(Protocol):
    """What a step needs of Kubeflow's Metrics artifact."""

    def log_metric(self, metric: str, value: float) -> None:
        """Show a figure beside the step."""


def sources(config: str) -> tuple[str, str]:
    """What tells the states of the data's and the base model's source. What cannot be told is new each time."""
    run = parse_config(config)

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from uuid import uuid4

        generated = run.data.source == "phantom"
        data = "generated" if generated else _fingerprint(run.data.source) or uuid4().hex
        pinned = run.model.base.startswith("tiny:") or bool(re.fullmatch(r"[0-9a-f]{40}", run.model.revision))
        base = _fingerprint(run.model.base) or ("pinned" if pinned else uuid4().hex)
        return {"data": data, "base": base}

    values = run_step(Step("convert", "sources", {}, run.data.source, {}), body, reuse=False)
    return str(values["data"]), str(values["base"])


def base(config: str, model: str) -> None:
    """Write the base model's folder to `model`."""
    run = parse_config(config)
    tiny = run.model.base.startswith("tiny:")
    settings = {
        "base": run.model.base,
        "revision": run.model.revision,
        "tiny": run.model.tiny.model_dump() if tiny else None,
        "fingerprint": None if tiny else _fingerprint(run.model.base),
    }

    def body(out: dict[str, Path], scratch: Path) -> None:
        from medforge.models.load import import_base
        from medforge.storage import download

        import_base(run.model, out["model"], download)

    run_step(Step("models", "base", {}, settings, {"model": Path(model)}), body)


def convert(config: str, dataset: str, metrics: Metrics) -> None:
    """Convert the source to a data set at `dataset`."""
    run = parse_config(config)

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.convert import run as run_convert

        return _samples(run_convert(run.data.source, out["dataset"], run.data, run.seed))

    values = run_step(Step("convert", "convert", {}, _converting(run), {"dataset": Path(dataset)}), body)
    _log(metrics, values)


def convert_shard(config: str, shard: int, part: str) -> None:
    """Read the rows of one shard of the source to the folder `part`."""
    run = parse_config(config)

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.convert import run_shard

        return {"rows": run_shard(run.data.source, out["part"], run.data, shard)["rows"]}

    settings = _converting(run) | {"shard": shard, "of": run.data.shards}
    run_step(Step("convert", f"convert-shard-{shard}", {}, settings, {"part": Path(part)}), body)


def convert_join(config: str, parts: Sequence[str], dataset: str, metrics: Metrics) -> None:
    """Make one data set at `dataset` of the parts of all shards: the one that `convert` makes."""
    run = parse_config(config)

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.convert import join

        return _samples(join([Path(part) for part in parts], out["dataset"], run.data, run.seed))

    inputs = {f"part-{number}": Path(part) for number, part in enumerate(parts)}
    step = Step("convert", "convert", inputs, _converting(run), {"dataset": Path(dataset)})
    _log(metrics, run_step(step, body))


def _converting(run: RunConfig) -> dict[str, Any]:
    """What decides a data set: all but the number of shards that make it."""
    data = run.data.model_dump(exclude={"shards"})
    return {"data": data, "seed": run.seed, "fingerprint": _fingerprint(run.data.source)}


def _samples(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {split: counts["samples"] for split, counts in manifest["counts"].items()}


def validate(
    config: str, dataset: str, model: str, clean: str, metrics: Metrics, checks: Sequence[str] | None = None
) -> None:
    """Write the samples of `dataset` that training can use to `clean`; `checks` are what shards found, if any did."""
    run = parse_config(config)
    files = None if checks is None else [Path(file) for file in checks]

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.validate import run as run_validate

        report = run_validate(Path(dataset), Path(model), out["clean"], run.data, run.model, checks=files)
        return {name: sum(report["counts"][name].values()) for name in ("in", "kept", "rejected")}

    inputs = {"dataset": Path(dataset), "model": Path(model)}
    inputs |= {f"checks-{number}": file for number, file in enumerate(files or [])}
    values = run_step(Step("validate", "validate", inputs, _validating(run), {"clean": Path(clean)}), body)
    _log(metrics, values)


def validate_shard(config: str, shard: int, dataset: str, model: str, checks: str) -> None:
    """Try the samples of one shard of `dataset`; what was found goes to the file `checks`."""
    run = parse_config(config)

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.validate import run_shard

        return {"samples": run_shard(Path(dataset), Path(model), out["checks"], run.data, run.model, shard)}

    inputs = {"dataset": Path(dataset), "model": Path(model)}
    settings = _validating(run) | {"shard": shard, "of": run.data.shards}
    run_step(Step("validate", f"validate-shard-{shard}", inputs, settings, {"checks": Path(checks)}), body)


def _validating(run: RunConfig) -> dict[str, Any]:
    return {"data": run.data.model_dump(include={"shared_images", "max_rejected"}), "model": _seeing(run)}


def train(
    config: str, stage: str, model: str, dataset: str, before: str, adapters: str, logs: str, metrics: Metrics
) -> None:
    """Train one stage on top of the stack `before` ("" for the first) and write the longer stack to `adapters`."""
    run = parse_config(config)

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.train import Inputs
        from medforge.train import run as run_stage

        given = Inputs(Path(model), Path(dataset), Path(before) if before else None)
        wanted, kept = run.stage(stage), _checkpoints(run)
        about = run_stage(given, out["adapters"], scratch, out["logs"], wanted, run.model, run.seed, run.parallel, kept)
        return _trained(about)

    _log(metrics, run_step(_training(run, stage, model, dataset, before, adapters, logs), body))


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
    run = parse_config(config)

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
            _checkpoints(run),
        )
        with connect(create=False) as store:
            trainjob.run(find(os.environ), store, job, nodes)
        return _trained(told(job))

    _log(metrics, run_step(_training(run, stage, model, dataset, before, adapters, logs), body))


def _training(run: RunConfig, stage: str, model: str, dataset: str, before: str, adapters: str, logs: str) -> Step:
    """The step that trains a stage, on however many machines."""
    inputs = {"model": Path(model), "dataset": Path(dataset)} | ({"before": Path(before)} if before else {})
    settings = {
        "stage": run.stage(stage).decisive(),
        "model": _seeing(run),
        "dtype": run.model.dtype,
        "seed": run.seed,
    }
    outputs = {"adapters": Path(adapters), "logs": Path(logs)}
    return Step("train", f"train-{stage}", inputs, settings, outputs, logs=frozenset({"logs"}))


def _checkpoints(run: RunConfig) -> CheckpointConfig:
    url = f"{run.checkpoints.url.rstrip('/')}/{run.name}" if run.checkpoints.url else ""
    return run.checkpoints.model_copy(update={"url": url})


def _trained(about: Mapping[str, Any]) -> dict[str, Any]:
    """What of a stage's stage.json is shown beside the step."""
    return {name: about[name] for name in ("steps", "best_step", "trainable_parameters")} | about["validation"]


def merge(config: str, model: str, adapters: str, dataset: str, merged: str, metrics: Metrics) -> None:
    """Write the base with all adapters merged to `merged`, with the proof that both say the same."""
    run = parse_config(config)
    inputs = {"model": Path(model), "adapters": Path(adapters), "dataset": Path(dataset)}
    settings = {"model": _seeing(run), "dtype": run.model.dtype}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.merge import run as run_merge

        proof = run_merge(Path(model), Path(adapters), Path(dataset), out["merged"], run.model)
        return {name: proof[name] for name in ("max_logit_difference", "max_logit", "same_best_token")}

    _log(metrics, run_step(Step("merge", "merge", inputs, settings, {"merged": Path(merged)}), body))


def predict(config: str, arm: str, model: str, dataset: str, predictions: str) -> None:
    """Let the model answer the split to be scored; `arm` is what its predictions are called."""
    run = parse_config(config)
    evaluate_settings = run.evaluate.model_dump(exclude={"report_samples"})
    settings: dict[str, Any] = {
        "arm": arm,
        "evaluate": evaluate_settings,
        "model": _seeing(run),
        "dtype": run.model.dtype,
    }
    settings |= {"seed": run.seed}
    inputs = {"model": Path(model), "dataset": Path(dataset)}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.evaluate.predict import run as run_predict

        out["predictions"].mkdir(exist_ok=True)
        about = run_predict(
            arm, Path(model), Path(dataset), out["predictions"] / f"{arm}.jsonl", run.evaluate, run.model, run.seed
        )
        return {"model": about["model"], "n": about["n"]}

    run_step(Step("evaluate", f"predict-{arm}", inputs, settings, {"predictions": Path(predictions)}), body)


def evaluate(config: str, base: str, tuned: str, dataset: str, results: str, metrics: Metrics) -> None:
    """Score the predictions of both arms; results.json and comparison.md go to the folder `results`."""
    run = parse_config(config)
    about = {"run": run.name, "base model": _base_name(run), "code": code_version()}
    files = {"base": Path(base) / "base.jsonl", "tuned": Path(tuned) / "tuned.jsonl"}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.evaluate import compare, score
        from medforge.files import write_atomic

        scored = score.run(files, Path(dataset), out["results"], about)
        write_atomic(out["results"] / "comparison.md", compare.comparison(scored))
        cells = {f"{arm}_{name}": scored["arms"][arm]["all"][name]["value"] for arm in files for name in _HEADLINE}
        return {name: value for name, value in cells.items() if value is not None}

    inputs = {"base": files["base"], "tuned": files["tuned"], "dataset": Path(dataset)}
    _log(metrics, run_step(Step("evaluate", "evaluate", inputs, about, {"results": Path(results)}), body))


_HEADLINE = ("exact_match", "token_f1", "closed_accuracy", "perplexity", "region_iou", "match_auroc")


def gate(config: str, results: str, verdict: str, metrics: Metrics) -> bool:
    """Judge the results by the run's policy; the verdict goes to the file `verdict`. Returns whether it passed."""
    run = parse_config(config)
    file = Path(results) / "results.json"

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.release.policy import judge, verdict_markdown

        judged = judge(read_json(file), run.policy)
        write_json(out["verdict"], judged)
        print(verdict_markdown(judged), flush=True)
        return {"passed": judged["passed"], "rules": len(judged["rules"])}

    step = Step("release", "gate", {"results": file}, run.policy.model_dump(), {"verdict": Path(verdict)})
    values = run_step(step, body)
    _log(metrics, values)
    return bool(values["passed"])


def report(
    config: str, results: str, base: str, tuned: str, dataset: str, adapters: str, verdict: str, html: str
) -> None:
    """Write the self-contained report to the file `html`."""
    run = parse_config(config)
    files = {"base": Path(base) / "base.jsonl", "tuned": Path(tuned) / "tuned.jsonl"}

    def body(out: dict[str, Path], scratch: Path) -> None:
        from medforge.dataset import Dataset
        from medforge.evaluate import report as write_report
        from medforge.evaluate import score
        from medforge.files import link_tree
        from medforge.models.load import stack

        curves = {path.name: read_json(path / "stage.json")["curves"] for path in stack(Path(adapters))}
        written = write_report.write(
            read_json(Path(results) / "results.json"),
            {arm: score.read_arm(arm, path) for arm, path in files.items()},
            Dataset.open(dataset),
            scratch,
            read_json(Path(verdict)),
            curves,
            samples=run.evaluate.report_samples,
        )
        link_tree(written, out["html"])

    inputs = {
        "results": Path(results) / "results.json",
        "base": files["base"],
        "tuned": files["tuned"],
        "dataset": Path(dataset),
        "adapters": Path(adapters),
        "verdict": Path(verdict),
    }
    run_step(Step("evaluate", "report", inputs, run.evaluate.report_samples, {"html": Path(html)}), body)


def publish(
    config: str,
    model: str,
    base_model: str,
    adapters: str,
    dataset: str,
    tuned: str,
    results: str,
    verdict: str,
    html: str,
) -> str:
    """Publish the candidate as a release and let the run's channel name it. Returns the release's digest."""
    from datetime import datetime, timezone

    from medforge.models.load import stack
    from medforge.release.publish import publish as publish_release
    from medforge.storage import connect

    run = parse_config(config)
    manifest = read_json(Path(dataset) / "manifest.json")
    about = {
        "name": run.name,
        "base": _base_name(run),
        "base_digest": tree_digest(Path(base_model)),
        "dataset": manifest["source"],
        "dataset_digest": manifest["root"],
        "licence": manifest["licence"],
        "min_pixels": run.model.min_pixels,
        "max_pixels": run.model.max_pixels,
        "code_version": code_version(),
        "seed": run.seed,
        "stages": {path.name: tree_digest(path) for path in stack(Path(adapters))},
    }
    parts = {
        "model": Path(model),
        "results.json": Path(results) / "results.json",
        "verdict.json": Path(verdict),
        "report.html": Path(html),
    }
    predictions = Path(tuned) / "tuned.jsonl"

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        reference = scratch / "reference.json"
        write_json(reference, _reference(Path(dataset), predictions, run.evaluate.split))
        # never answered from the workspace alone: the store may be another one, or have lost the release
        with connect() as store:
            now = datetime.now(timezone.utc)
            released = parts | {reference.name: reference}
            return publish_release(store, run.publish.bucket, run.publish.channel, released, about, now)

    inputs = {name.partition(".")[0]: path for name, path in parts.items()} | {"tuned": predictions}
    step = Step("release", "publish", inputs, {"about": about, "publish": run.publish.model_dump()}, {})
    return str(run_step(step, body, reuse=False)["release"])


def _reference(dataset: Path, predictions: Path, split: str) -> dict[str, Any]:
    """What the judged images and the candidate's answers to them look like, for a gateway to see drift against."""
    from medforge.dataset import Dataset, decode_image
    from medforge.evaluate.predictions import read
    from medforge.progress import track
    from medforge.reference import build

    rows = read(predictions)
    data = Dataset.open(dataset)
    answered = {row.id for row in rows}
    judged = (sample for sample in data.samples(split) if sample.id in answered)
    refs = {ref.sha256: ref for sample in judged for ref in sample.images}
    images = (decode_image(data.image_bytes(ref)) for ref in track(refs.values(), "reference", len(refs), "image"))
    return build(images, [row.prediction for row in rows])


def approved(release: str, bucket: str, metrics: Metrics) -> str:
    """The digest of the release that `release` (a digest or a channel) means. ValueError unless it may be served."""
    from medforge.release.promote import check, trusted_keys
    from medforge.release.publish import resolve
    from medforge.storage import connect

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        with connect(create=False) as store:
            digest = resolve(store, bucket, release)
            found = check(store, bucket, digest, trusted_keys())
        return {"release": digest, "signatures": len(found["signatures"])}

    step = Step("release", "approved", {}, {"release": release, "bucket": bucket}, {})
    values = run_step(step, body, reuse=False)
    _log(metrics, values)
    return str(values["release"])


def promote(release: str, bucket: str, channel: str) -> str:
    """Let the channel name the release, whose approval is checked again. Returns the digest before, "" without one."""
    from datetime import datetime, timezone

    from medforge.release.promote import promote as promote_release
    from medforge.release.promote import trusted_keys
    from medforge.storage import connect

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        with connect(create=False) as store:
            now = datetime.now(timezone.utc)
            return promote_release(store, bucket, release, channel, trusted_keys(), now)

    step = Step("release", "promote", {}, {"release": release, "channel": channel}, {})
    return str(run_step(step, body, reuse=False)["previous"] or "")


def deploy(release: str, percent: int, namespace: str, name: str, run: str) -> str:
    """Give `percent` of the callers the release as a canary. Returns its digest. `run` names whose canary it is."""
    with _rollout(namespace, name, "champion", run) as rollout:
        return rollout.deploy(release, percent / 100)


def watch(namespace: str, name: str, run: str, minutes: float, requests: int, metrics: Metrics) -> None:
    """Watch the canary for so long, until so many requests came; roll it back and fail when it is not good."""
    import os

    from medforge.rollout.watch import Patience, Prometheus

    prometheus = Prometheus.from_environment(os.environ)
    with _rollout(namespace, name, "champion", run) as rollout:
        seen = rollout.watch(prometheus, Patience(minutes * 60, 4 * minutes * 60, requests))
    _log(metrics, seen)


def complete(release: str, namespace: str, name: str, run: str, channel: str) -> None:
    """Give the canary's release to all callers, and let the channel name it."""
    with _rollout(namespace, name, channel, run) as rollout:
        rollout.promote(release)


def rollback(canary: int, state: str, namespace: str, name: str, run: str) -> None:
    """After a release that failed, remove its canary if it left one; nothing without a canary."""
    if canary and state != "SUCCEEDED":
        with _rollout(namespace, name, "champion", run) as rollout:
            taken = rollout.rollback(f"the release pipeline ended as {state}", only_run=run)
        print(f"rolled back {taken}" if taken else "no canary of this run is there", flush=True)


@contextmanager
def _rollout(namespace: str, name: str, channel: str, run: str) -> Iterator[Any]:
    from medforge.release.promote import trusted_keys
    from medforge.rollout.kubernetes import Kubernetes
    from medforge.rollout.rollout import Plan, Rollout
    from medforge.storage import connect

    api = Kubernetes.from_environment(namespace)
    with connect(create=False) as store:
        yield Rollout(api, store, Plan(name=name, channel=channel), trusted_keys(), f"pipeline {run}", run)


def _base_name(run: RunConfig) -> str:
    """The base as an artifact may name it: a local folder by its own name, as its path is this machine's."""
    path = Path(run.model.base)
    return path.name if path.is_absolute() else run.model.base


def _seeing(run: RunConfig) -> dict[str, int]:
    """The settings that decide what a model sees of a sample."""
    return {name: getattr(run.model, name) for name in ("min_pixels", "max_pixels", "max_length")}


def _fingerprint(source: str) -> str | None:
    """What tells that a source has changed, without reading all of it: its files' names, sizes and times.

    None for a source that is a word or a hub id. A source of objects is told by its listing.
    """
    path = Path(source)
    if source.startswith("s3://"):
        from medforge.storage import connect, parse_url

        bucket, prefix = parse_url(source)
        with connect(create=False) as store:
            return sha256_json([list(entry) for entry in store.list(bucket, prefix)])
    if not path.exists():
        return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    rows = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return sha256_json(rows)


def _log(metrics: Metrics, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, int | float):
            metrics.log_metric(name, float(value))
