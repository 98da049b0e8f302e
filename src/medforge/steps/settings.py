"""What each step reads of the configuration, and nothing else of it can be read.

A cache that keys a step on its parameters (Kubeflow's) reuses it while its part stays the same; the workspace, whose
keys hold what decides the result, can hold no more than the part, as the rest is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter

from medforge.config import RunConfig, parse_config
from medforge.files import canonical_json

_SEEING = ("model.min_pixels", "model.max_pixels", "model.max_length")

# sections, or single fields of one; `stages` is the one stage that the step is for
READS: dict[str, tuple[str, ...]] = {
    "sources": ("data.source", "model.base", "model.revision"),
    "base": ("model.base", "model.revision", "model.tiny"),
    "convert": ("seed", "data"),
    "validate": ("data.shards", "data.shared_images", "data.max_rejected", *_SEEING),
    "train": ("name", "seed", "stages", "parallel", "checkpoints", "model.dtype", *_SEEING),
    "merge": ("model.dtype", *_SEEING),
    "predict": (
        *("name", "seed", "checkpoints", "model.dtype", *_SEEING),
        *("evaluate.split", "evaluate.limit", "evaluate.batch_size", "evaluate.max_new_tokens"),
    ),
    "evaluate": ("name", "model.base"),
    "gate": ("policy",),
    "report": ("evaluate.report_samples",),
}

_Model = TypeVar("_Model", bound=BaseModel)


def part(config: str, step: str, stage: str = "") -> str:
    """What the step reads of a whole configuration, JSON to JSON; of the stages only the named one."""
    run = parse_config(config)
    tree = run.model_dump(mode="json")
    fields: dict[str, Any] = {}
    for path in READS[step]:
        section, _, field = path.partition(".")
        if field:
            fields.setdefault(section, {})[field] = tree[section][field]
        else:
            fields[section] = tree[section]
    if "stages" in fields:
        fields["stages"] = [run.stage(stage).model_dump(mode="json")]
    return canonical_json({"step": step, "reads": fields}).decode()


def read(config: str, step: str, stage: str = "") -> RunConfig:
    """The step's part of `config`, a whole configuration or what `part` wrote of it, both as JSON.

    Other fields are not there: to read one is an AttributeError. ValueError for the part of another step or stage.
    """
    given = json.loads(config)
    if "reads" not in given:
        given = json.loads(part(config, step, stage))
    if given["step"] != step:
        raise ValueError(f"the step {step} was given the configuration of the step {given['step']}")
    values = {name: _value(name, value) for name, value in given["reads"].items()}
    run = _only(RunConfig.model_construct(**values), values)
    if stage:
        run.stage(stage)
    return run


def _value(name: str, value: Any) -> Any:
    kind: Any = RunConfig.model_fields[name].annotation
    found = TypeAdapter(kind).validate_python(value)
    return _only(found, value) if isinstance(found, BaseModel) and isinstance(value, Mapping) else found


def _only(model: _Model, names: Iterable[str]) -> _Model:
    """The model without the fields that are not named, which would be defaults."""
    for name in type(model).model_fields.keys() - set(names):
        model.__dict__.pop(name, None)
    return model
