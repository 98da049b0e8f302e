"""Heads that are saved and loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from medforge.files import tree_digest
from medforge.models.heads import (
    TaskHeads,
    load_heads,
    load_task_model,
    parameter_groups,
    save_heads,
)
from medforge.models.load import stack
from tests.unit.models.heads.made import HIDDEN, set_log_variance

# files


def test_heads_come_back_as_they_were(tmp_path: Path, heads: TaskHeads) -> None:
    set_log_variance(heads, language=0.5, region=-1.0, match=2.0)
    save_heads(heads, tmp_path / "one")
    loaded = load_heads(tmp_path / "one")
    assert loaded is not None
    pooled = torch.randn(3, HIDDEN)
    assert torch.equal(loaded.region(pooled), heads.region(pooled))
    assert torch.equal(loaded.match(pooled), heads.match(pooled))
    assert {name: value.item() for name, value in loaded.log_variance.items()} == {
        "language": 0.5,
        "region": -1.0,
        "match": 2.0,
    }
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    save_heads(loaded, tmp_path / "two")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "heads/heads.json").read_text()) == {
        "schema_version": 1,
        "hidden": HIDDEN,
        "region": True,
        "match": True,
    }


@pytest.mark.parametrize(("region", "match"), [(True, False), (False, True)])
def test_one_head_alone_comes_back_alone(tmp_path: Path, region: bool, match: bool) -> None:
    save_heads(TaskHeads(8, region, match), tmp_path)
    loaded = load_heads(tmp_path)
    assert loaded is not None
    assert (loaded.hidden, loaded.region_head is not None, loaded.match_head is not None) == (8, region, match)


def test_other_users_may_read_the_files(tmp_path: Path, heads: TaskHeads) -> None:
    before = os.umask(0o077)
    try:
        save_heads(heads, tmp_path)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.rglob("*"))] == [0o755, 0o644, 0o644]


def test_loaded_heads_can_be_trained_and_loading_draws_nothing(tmp_path: Path, heads: TaskHeads) -> None:
    save_heads(heads, tmp_path)
    state = torch.get_rng_state()
    loaded = load_heads(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded is not None
    optimizer = torch.optim.SGD(parameter_groups(loaded, 0.1, 0.0))
    loaded.match(torch.randn(4, HIDDEN)).sum().backward()
    optimizer.step()
    again = load_heads(tmp_path)
    assert again is not None
    assert not torch.equal(*(one.get_parameter("match_head.3.weight") for one in (loaded, again)))


def test_a_folder_without_heads_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_heads(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"heads\.json: is empty"),
        ("{", r"heads\.json: line 1"),
        ("[]", r"heads\.json: is no heads\.json of schema_version 1"),
        ('{"schema_version": 2, "hidden": 16, "region": true, "match": true}', "schema_version 1, but"),
        ('{"schema_version": 1, "hidden": 16, "region": true}', r"heads\.json: field match is null"),
        ('{"schema_version": 1, "hidden": true, "region": true, "match": true}', r"field hidden is true"),
        ('{"schema_version": 1, "hidden": 0, "region": true, "match": true}', r"field hidden is 0"),
        ('{"schema_version": 1, "hidden": 16, "region": 1, "match": true}', r"field region is 1"),
        ('{"schema_version": 1, "hidden": 8, "region": true, "match": true}', r"heads\.safetensors: tensor .*\(8,\)"),
        ('{"schema_version": 1, "hidden": 10000000000, "region": true, "match": true}', r"field hidden is 1000"),
        (
            '{"schema_version": 1, "hidden": 16, "region": true, "match": false}',
            r"tensor log_variance\.match: expected none",
        ),
    ],
)
def test_a_broken_description_is_told(tmp_path: Path, heads: TaskHeads, content: str, message: str) -> None:
    save_heads(heads, tmp_path)
    (tmp_path / "heads").mkdir(exist_ok=True)
    (tmp_path / "heads/heads.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_heads(tmp_path)


def test_broken_weights_are_told(tmp_path: Path, heads: TaskHeads) -> None:
    save_heads(heads, tmp_path)
    path = tmp_path / "heads/heads.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"heads\.safetensors: is not a whole safetensors file"):
            load_heads(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"heads\.safetensors: no such file"):
        load_heads(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "heads/heads.json").unlink()
    with pytest.raises(ValueError, match=r"heads\.json: no such file"):
        load_heads(tmp_path)


def test_weights_that_do_not_fit_or_are_not_finite_are_told(tmp_path: Path, heads: TaskHeads) -> None:
    from safetensors.torch import load_file, save_file

    save_heads(heads, tmp_path)
    path = tmp_path / "heads/heads.safetensors"
    tensors = load_file(path)
    name = "match_head.1.weight"
    for broken, message in (
        (
            {key: value for key, value in tensors.items() if key != name},
            r"match_head\.1\.weight: expected .*found none",
        ),
        (tensors | {"extra": torch.zeros(1)}, r"extra: expected none"),
        (tensors | {name: tensors[name].double()}, r"match_head\.1\.weight: expected .*float64"),
        (tensors | {name: tensors[name] * float("nan")}, r"match_head\.1\.weight: has values that are not finite"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            load_heads(tmp_path)


# the model with its heads


def test_the_heads_of_the_last_adapter_that_has_some_are_taken(base: Path, adapters: Path, tmp_path: Path) -> None:
    """Else those of the model's folder. Nothing else of the model changes by a heads file beside it."""
    from medforge.models.load import load_model

    shutil.copytree(base, tmp_path / "model")
    shutil.copytree(adapters, tmp_path / "stack")
    folder, (see, say) = tmp_path / "model", stack(tmp_path / "stack")
    with pytest.raises(ValueError, match=r"model: neither it nor an adapter has heads \(heads/heads\.json\)"):
        load_task_model(folder, "float32", [see, say])

    def shift(place: Path, value: float) -> None:
        heads = TaskHeads(128, region=True, match=False)
        set_log_variance(heads, language=value)
        save_heads(heads, place)

    shift(folder, 1.0)
    loaded = load_task_model(folder, "bfloat16")
    assert loaded.heads.log_variance["language"].item() == 1.0
    assert {p.dtype for p in loaded.heads.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert load_task_model(folder, "float32", [see, say]).heads.log_variance["language"].item() == 1.0
    shift(see, 2.0)
    loaded = load_task_model(folder, "float32", [see, say])
    assert loaded.heads.log_variance["language"].item() == 2.0
    plain = load_model(base, "float32", stack(adapters)).state_dict()
    found = loaded.model.state_dict()
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    shift(say, 3.0)
    assert load_task_model(folder, "float32", [see, say]).heads.log_variance["language"].item() == 3.0


def test_heads_of_another_model_are_told(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    for family in tiny_models:
        shutil.copytree(tiny_models[family], tmp_path / family)
        save_heads(TaskHeads(127, region=True, match=True), tmp_path / family)
        with pytest.raises(ValueError, match=r"heads\.json: hidden is 127, but the model of .* has 128"):
            load_task_model(tmp_path / family, "float32")
