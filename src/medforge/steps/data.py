"""The steps of the data and of the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medforge.config import RunConfig
from medforge.steps.common import Metrics, fingerprint, log, seeing
from medforge.steps.settings import read
from medforge.workspace import Step, run_step


def sources(config: str) -> tuple[str, str]:
    """What tells the states of the data's and the base model's source. What cannot be told is new each time."""
    run = read(config, "sources")

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from uuid import uuid4

        generated = run.data.source == "phantom"
        data = "generated" if generated else fingerprint(run.data.source) or uuid4().hex
        pinned = run.model.base.startswith("tiny:") or bool(re.fullmatch(r"[0-9a-f]{40}", run.model.revision))
        base = fingerprint(run.model.base) or ("pinned" if pinned else uuid4().hex)
        return {"data": data, "base": base}

    values = run_step(Step("convert", "sources", {}, run.data.source, {}), body, reuse=False)
    return str(values["data"]), str(values["base"])


def base(config: str, model: str) -> None:
    """Write the base model's folder to `model`."""
    run = read(config, "base")
    tiny = run.model.base.startswith("tiny:")
    settings = {
        "base": run.model.base,
        "revision": run.model.revision,
        "tiny": run.model.tiny.model_dump() if tiny else None,
        "fingerprint": None if tiny else fingerprint(run.model.base),
    }

    def body(out: dict[str, Path], scratch: Path) -> None:
        from medforge.models.load import import_base
        from medforge.storage import download

        import_base(run.model, out["model"], download)

    run_step(Step("models", "base", {}, settings, {"model": Path(model)}), body)


def convert(config: str, dataset: str, metrics: Metrics) -> None:
    """Convert the source to a data set at `dataset`."""
    run = read(config, "convert")

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.convert import run as run_convert

        return _samples(run_convert(run.data.source, out["dataset"], run.data, run.seed))

    values = run_step(Step("convert", "convert", {}, _converting(run), {"dataset": Path(dataset)}), body)
    log(metrics, values)


def convert_shard(config: str, shard: int, part: str) -> None:
    """Read the rows of one shard of the source to the folder `part`."""
    run = read(config, "convert")

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.convert import run_shard

        return {"rows": run_shard(run.data.source, out["part"], run.data, shard)["rows"]}

    settings = _converting(run) | {"shard": shard, "of": run.data.shards}
    run_step(Step("convert", f"convert-shard-{shard}", {}, settings, {"part": Path(part)}), body)


def convert_join(config: str, parts: Sequence[str], dataset: str, metrics: Metrics) -> None:
    """Make one data set at `dataset` of the parts of all shards: the one that `convert` makes."""
    run = read(config, "convert")

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.convert import join

        return _samples(join([Path(part) for part in parts], out["dataset"], run.data, run.seed))

    inputs = {f"part-{number}": Path(part) for number, part in enumerate(parts)}
    step = Step("convert", "convert", inputs, _converting(run), {"dataset": Path(dataset)})
    log(metrics, run_step(step, body))


def _converting(run: RunConfig) -> dict[str, Any]:
    """What decides a data set: all but the number of shards that make it."""
    data = run.data.model_dump(exclude={"shards"})
    return {"data": data, "seed": run.seed, "fingerprint": fingerprint(run.data.source)}


def _samples(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {split: counts["samples"] for split, counts in manifest["counts"].items()}


def validate(
    config: str, dataset: str, model: str, clean: str, metrics: Metrics, checks: Sequence[str] | None = None
) -> None:
    """Write the samples of `dataset` that training can use to `clean`; `checks` are what shards found, if any did."""
    run = read(config, "validate")
    files = None if checks is None else [Path(file) for file in checks]

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.validate import run as run_validate

        report = run_validate(Path(dataset), Path(model), out["clean"], run.data, run.model, checks=files)
        return {name: sum(report["counts"][name].values()) for name in ("in", "kept", "rejected")}

    inputs = {"dataset": Path(dataset), "model": Path(model)}
    inputs |= {f"checks-{number}": file for number, file in enumerate(files or [])}
    values = run_step(Step("validate", "validate", inputs, _validating(run), {"clean": Path(clean)}), body)
    log(metrics, values)


def validate_shard(config: str, shard: int, dataset: str, model: str, checks: str) -> None:
    """Try the samples of one shard of `dataset`; what was found goes to the file `checks`."""
    run = read(config, "validate")

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.validate import run_shard

        return {"samples": run_shard(Path(dataset), Path(model), out["checks"], run.data, run.model, shard)}

    inputs = {"dataset": Path(dataset), "model": Path(model)}
    settings = _validating(run) | {"shard": shard, "of": run.data.shards}
    run_step(Step("validate", f"validate-shard-{shard}", inputs, settings, {"checks": Path(checks)}), body)


def _validating(run: RunConfig) -> dict[str, Any]:
    return {"data": run.data.model_dump(include={"shared_images", "max_rejected"}), "model": seeing(run)}
