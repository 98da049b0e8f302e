"""The steps of the pipeline: what a component calls. Each takes the run's configuration as JSON and paths as text.

A step reads its part of the configuration, does the work through `workspace.run_step`, and logs a few figures to
`metrics`, an object with `log_metric(name, value)` (Kubeflow's Metrics artifact).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from medforge.config import RunConfig, parse_config
from medforge.files import read_json, sha256_json, tree_digest, write_json
from medforge.workspace import Step, code_version, run_step


class Metrics(Protocol):
    """What a step needs of Kubeflow's Metrics artifact."""

    def log_metric(self, metric: str, value: float) -> None:
        """Show a figure beside the step."""


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
    settings = {"data": run.data.model_dump(), "seed": run.seed, "fingerprint": _fingerprint(run.data.source)}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.convert import run as run_convert

        manifest = run_convert(run.data.source, out["dataset"], run.data, run.seed)
        return {split: counts["samples"] for split, counts in manifest["counts"].items()}

    values = run_step(Step("convert", "convert", {}, settings, {"dataset": Path(dataset)}), body)
    _log(metrics, values)


def validate(config: str, dataset: str, model: str, clean: str, metrics: Metrics) -> None:
    """Write the samples of `dataset` that training can use to `clean`."""
    run = parse_config(config)
    names = {"shared_images", "max_rejected"}
    settings = {"data": run.data.model_dump(include=names), "model": _seeing(run)}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.validate import run as run_validate

        report = run_validate(Path(dataset), Path(model), out["clean"], run.data, run.model)
        return {name: sum(report["counts"][name].values()) for name in ("in", "kept", "rejected")}

    inputs = {"dataset": Path(dataset), "model": Path(model)}
    values = run_step(Step("validate", "validate", inputs, settings, {"clean": Path(clean)}), body)
    _log(metrics, values)


def train(
    config: str, stage: str, model: str, dataset: str, before: str, adapters: str, logs: str, metrics: Metrics
) -> None:
    """Train one stage on top of the stack `before` ("" for the first) and write the longer stack to `adapters`."""
    run = parse_config(config)
    wanted = run.stage(stage)
    inputs = {"model": Path(model), "dataset": Path(dataset)} | ({"before": Path(before)} if before else {})
    settings = {"stage": wanted.decisive(), "model": _seeing(run), "dtype": run.model.dtype, "seed": run.seed}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.train import Inputs
        from medforge.train import run as run_stage

        given = Inputs(Path(model), Path(dataset), Path(before) if before else None)
        url = f"{run.checkpoints.url.rstrip('/')}/{run.name}" if run.checkpoints.url else ""
        kept = run.checkpoints.model_copy(update={"url": url})
        about = run_stage(given, out["adapters"], scratch, out["logs"], wanted, run.model, run.seed, run.parallel, kept)
        return {name: about[name] for name in ("steps", "best_step", "trainable_parameters")} | about["validation"]

    outputs = {"adapters": Path(adapters), "logs": Path(logs)}
    step = Step("train", f"train-{stage}", inputs, settings, outputs, logs=frozenset({"logs"}))
    _log(metrics, run_step(step, body))


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
