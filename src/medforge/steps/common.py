"""What several steps need: their figures, and what tells a model's eyes and a source's state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from medforge.config import CheckpointConfig, RunConfig
from medforge.files import sha256_json


class Metrics(Protocol):
    """What a step needs of Kubeflow's Metrics artifact."""

    def log_metric(self, metric: str, value: float) -> None:
        """Show a figure beside the step."""


def log(metrics: Metrics, values: Mapping[str, Any]) -> None:
    """Show those of the values that are figures."""
    for name, value in values.items():
        if isinstance(value, int | float):
            metrics.log_metric(name, float(value))


def base_name(run: RunConfig) -> str:
    """The base as an artifact may name it: a local folder by its own name, as its path is this machine's."""
    path = Path(run.model.base)
    return path.name if path.is_absolute() else run.model.base


def seeing(run: RunConfig) -> dict[str, int]:
    """The settings that decide what a model sees of a sample."""
    return {name: getattr(run.model, name) for name in ("min_pixels", "max_pixels", "max_length")}


def checkpoints(run: RunConfig) -> CheckpointConfig:
    """Where the run's checkpoints go: a folder of its name."""
    url = f"{run.checkpoints.url.rstrip('/')}/{run.name}" if run.checkpoints.url else ""
    return run.checkpoints.model_copy(update={"url": url})


def fingerprint(source: str) -> str | None:
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
