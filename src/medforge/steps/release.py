"""The steps of a release: published, found approved, named by a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medforge.config import parse_config
from medforge.files import read_json, tree_digest, write_json
from medforge.steps.common import Metrics, base_name, log
from medforge.workspace import Step, code_version, run_step


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
        "base": base_name(run),
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
    log(metrics, values)
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
