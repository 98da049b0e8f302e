"""Bases from wherever they are, broken ones, and the order of a stack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medforge.config import ModelConfig, TinyConfig
from medforge.files import list_files, tree_digest
from medforge.models.load import import_base, load_model, stack


def no_download(url: str, out: Path) -> None:
    raise AssertionError(f"{url} was asked for")


def test_a_stack_is_in_the_order_of_training(tmp_path: Path) -> None:
    for name in ("10-last", "02-say", "01-see", "03-again"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "04-file").touch()
    assert [path.name for path in stack(tmp_path)] == ["01-see", "02-say", "03-again", "10-last"]
    assert stack(None) == []


def test_a_folder_is_taken_as_it_is(base: Path, tmp_path: Path) -> None:
    import_base(ModelConfig(base=str(base)), tmp_path / "model", no_download)
    assert tree_digest(tmp_path / "model") == tree_digest(base)


def test_a_folder_in_the_home_folder_is_found(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(base, tmp_path / "home" / "model")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    import_base(ModelConfig(base="~/model"), tmp_path / "out", no_download)
    assert tree_digest(tmp_path / "out") == tree_digest(base)


def test_a_tiny_base_is_built(base: Path, tmp_path: Path) -> None:
    config = ModelConfig(base="tiny:qwen3-vl", tiny=TinyConfig(steps=0))
    import_base(config, tmp_path / "model", no_download)
    assert tree_digest(tmp_path / "model") == tree_digest(base)


def test_an_object_store_is_asked_for_its_prefix(base: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def download(url: str, out: Path) -> None:
        asked.append(url)
        shutil.copytree(base, out)

    import_base(ModelConfig(base="s3://bucket/models/small"), tmp_path / "model", download)
    assert asked == ["s3://bucket/models/small"]
    assert tree_digest(tmp_path / "model") == tree_digest(base)


@pytest.mark.parametrize("name", ["./missing", "../missing", "~/missing", "/missing"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_download)
    with pytest.raises(ValueError, match=r"model\.base: no folder is at .*missing"):
        import_base(ModelConfig(base=name), tmp_path / "model", no_download)
    assert not (tmp_path / "model").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        import_base(ModelConfig(base=str(tmp_path / "notes")), tmp_path / "model", no_download)
    (tmp_path / "notes" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert' is not one of"):
        import_base(ModelConfig(base=str(tmp_path / "notes")), tmp_path / "model", no_download)
    assert not (tmp_path / "model").exists()


def test_a_hub_model_that_does_not_come_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'someone/model'.*revision 'v2'.*trying to locate.*hf auth login") as caught:
        import_base(ModelConfig(base="someone/model", revision="v2"), tmp_path / "model", no_download)
    assert "and more" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_hub_id_is_told(tmp_path: Path) -> None:
    """The hub's client checks the name before it asks for anything."""
    with pytest.raises(ValueError, match=r"model\.base: 'a//b' is no local folder"):
        import_base(ModelConfig(base="a//b"), tmp_path / "model", no_download)


def test_a_hub_model_is_its_files_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client leaves notes with times beside the files: with them, two imports would differ."""
    asked: dict[str, Any] = {}

    def download(name: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        asked.update(name=name, revision=revision)
        shutil.copytree(base, local_dir, dirs_exist_ok=True)
        notes = local_dir / ".cache" / "huggingface" / "download"
        notes.mkdir(parents=True)
        (notes / "config.json.metadata").write_text("0123\nabc\n1700000000.5\n")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    import_base(ModelConfig(base="someone/model", revision="abc"), tmp_path / "model", no_download)
    assert asked == {"name": "someone/model", "revision": "abc"}
    assert tree_digest(tmp_path / "model") == tree_digest(base)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "copy")
    return tmp_path / "copy"


def test_broken_weights_are_told(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="copy: the model cannot be loaded"):
            load_model(copy, "float32")
    path.unlink()
    with pytest.raises(ValueError, match="copy: the model cannot be loaded"):
        load_model(copy, "float32")


def test_a_missing_tensor_is_not_made_up(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing; first: .*layers\.1\.mlp\.up_proj"):
        load_model(copy, "float32")


def test_a_tensor_of_another_shape_is_told(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = np.zeros((3, 5), np.float32)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="copy: the model cannot be loaded"):
        load_model(copy, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_the_files_in_the_dtype_asked_for(base: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file

    stored = load_file(base / "model.safetensors")
    model = load_model(base, dtype)
    named = dict(model.named_parameters())
    assert {parameter.dtype for parameter in named.values()} == {getattr(torch, dtype)}
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    assert torch.equal(named[name].cpu(), stored[name].to(getattr(torch, dtype)))


def test_adapters_are_merged_in_their_order(base: Path, adapters: Path) -> None:
    """The whole sum is worked out in tests/unit/merge; here: both count, and no adapter layer is left."""
    import torch

    names = [path.name for path in stack(adapters)]
    assert names == ["01-see", "02-say"]
    plain, first, both = (load_model(base, "float32", stack(adapters)[:n]).state_dict() for n in range(3))
    assert set(plain) == set(first) == set(both)
    merger, query = "model.visual.merger.linear_fc1.weight", "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plain[merger], first[merger])
    assert not torch.equal(first[merger], both[merger])
    assert torch.equal(plain[query], first[query])
    assert not torch.equal(first[query], both[query])


# --- stages that tuned layers themselves


LAYER = "model.language_model.layers.1.mlp.up_proj.weight"


def full_stage(folder: Path, weights: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(weights, folder / "weights.safetensors")
    return folder


def test_a_stack_holds_both_kinds_of_stage(tmp_path: Path) -> None:
    for name, file in (("03-say", "adapter_config.json"), ("01-see", "weights.safetensors"), ("02-note", "notes")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    assert [path.name for path in stack(tmp_path)] == ["01-see", "03-say"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tuned_layers_take_the_place_of_the_bases(base: Path, tmp_path: Path, dtype: str) -> None:
    import torch

    torch.manual_seed(0)
    plain = load_model(base, dtype).state_dict()
    tuned = torch.randn(plain[LAYER].shape)
    found = load_model(base, dtype, [full_stage(tmp_path / "01-all", {LAYER: tuned})]).state_dict()
    assert torch.equal(found[LAYER], tuned.to(getattr(torch, dtype)))
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain if name != LAYER)
    assert {tensor.dtype for name, tensor in found.items() if name.endswith("weight")} == {getattr(torch, dtype)}


def test_stages_of_both_kinds_apply_in_their_order(base: Path, adapters: Path, tmp_path: Path) -> None:
    """Tuned layers replace what an adapter before them made of a layer, and an adapter after them adds to it."""
    import torch

    merger = "model.visual.merger.linear_fc1.weight"
    see, say = stack(adapters)
    torch.manual_seed(0)
    base_merger = load_model(base, "float32").state_dict()[merger]
    delta = load_model(base, "float32", [say]).state_dict()[merger] - base_merger
    assert float(delta.abs().max()) > 0
    tuned = torch.randn(base_merger.shape)
    full = full_stage(tmp_path / "02-all", {merger: tuned})
    assert torch.equal(load_model(base, "float32", [see, full]).state_dict()[merger], tuned)
    both = load_model(base, "float32", [see, full, say]).state_dict()[merger]
    torch.testing.assert_close(both, tuned + delta, rtol=1e-5, atol=1e-6)


def test_tuned_layers_of_another_model_are_told(base: Path, tmp_path: Path) -> None:
    import torch

    unknown = full_stage(tmp_path / "a", {"model.language_model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"weights\.safetensors: holds .*layers\.9.*which the model does not have"):
        load_model(base, "float32", [unknown])
    shape = full_stage(tmp_path / "b", {LAYER: torch.zeros(3, 5)})
    with pytest.raises(
        ValueError, match=r"weights\.safetensors: the weights cannot be loaded: .*size mismatch.*up_proj"
    ):
        load_model(base, "float32", [shape])


def test_broken_tuned_layers_are_told(base: Path, tmp_path: Path) -> None:
    import torch

    path = full_stage(tmp_path / "a", {LAYER: torch.zeros(256, 128)}) / "weights.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"weights\.safetensors: the weights cannot be loaded"):
            load_model(base, "float32", [tmp_path / "a"])


def test_loading_writes_nothing(base: Path) -> None:
    before = list_files(base), tree_digest(base)
    load_model(base, "float32")
    assert (list_files(base), tree_digest(base)) == before
