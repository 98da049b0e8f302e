"""Merging against the sum worked out from the files, and a proof that can fail."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file

from medforge.config import ModelConfig
from medforge.files import list_files, read_json, sha256_file, tree_digest
from medforge.merge import TOLERANCE, run
from medforge.models.encode import Encoder
from medforge.models.load import load_model, stack

CONFIG = ModelConfig()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, base: Path, adapters: Path, phantoms: Path) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    run(base, adapters, phantoms, out, CONFIG)
    return out


def by_hand(base: Path, adapters: Path) -> tuple[dict[str, np.ndarray], set[str]]:
    """Every tensor as W + sum of B A alpha / r, in float64, and the names of those that an adapter changes."""
    weights = {name: tensor.astype(np.float64) for name, tensor in load_file(base / "model.safetensors").items()}
    changed: set[str] = set()
    for folder in stack(adapters):
        settings = read_json(folder / "adapter_config.json")
        parts = load_file(folder / "adapter_model.safetensors")
        for name, down in parts.items():
            if not name.endswith(".lora_A.weight"):
                continue
            up = parts[name.replace(".lora_A.", ".lora_B.")].astype(np.float64)
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            weights[target] += up @ down.astype(np.float64) * (settings["lora_alpha"] / settings["r"])
            changed.add(target)
    return weights, changed


def test_the_weights_are_the_sum_over_the_stack(base: Path, adapters: Path, merged: Path) -> None:
    expected, changed = by_hand(base, adapters)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert set(after) == set(before)
    # both stages tune the merger, the second the attention too
    assert len(changed) == 2 * 2 + 3 * 4
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name in changed:
            np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-6, err_msg=name)
            assert np.abs(tensor - before[name]).max() > 1e-4
        else:
            np.testing.assert_array_equal(tensor, before[name], err_msg=name)


def test_the_proof_tells_what_was_compared(base: Path, adapters: Path, phantoms: Path, merged: Path) -> None:
    proof = read_json(merged / "merge_proof.json")
    assert proof["base"] == tree_digest(base)
    assert proof["adapters"] == {path.name: tree_digest(path) for path in stack(adapters)}
    assert proof["weights"] == {"model.safetensors": sha256_file(merged / "model.safetensors")}
    assert 0 <= proof["max_logit_difference"] <= proof["tolerance"] * proof["max_logit"]
    assert proof["same_best_token"] == 1.0
    assert proof["positions"] > 100
    assert (proof["dtype"], proof["tolerance"]) == ("float32", TOLERANCE["float32"])


def test_the_folder_is_a_whole_model(base: Path, merged: Path) -> None:
    assert set(list_files(merged)) == set(list_files(base)) | {"merge_proof.json"}
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (merged / name).is_file()
    assert {path.stat().st_mode & 0o777 for path in merged.iterdir()} == {0o644}
    ours, before = (Encoder(folder, 56 * 56, 112 * 112) for folder in (merged, base))
    assert ours.template == before.template
    assert ours.tokenizer.get_vocab() == before.tokenizer.get_vocab()


def test_merging_leaves_its_inputs_alone(tmp_path: Path, base: Path, adapters: Path, phantoms: Path) -> None:
    before = tree_digest(base), tree_digest(adapters)
    run(base, adapters, phantoms, tmp_path / "model", CONFIG)
    assert (tree_digest(base), tree_digest(adapters)) == before


def test_merging_again_gives_the_same_bytes(
    tmp_path: Path, base: Path, adapters: Path, phantoms: Path, merged: Path
) -> None:
    run(base, adapters, phantoms, tmp_path / "model", CONFIG)
    assert tree_digest(tmp_path / "model") == tree_digest(merged)


def test_bfloat16_is_within_its_own_tolerance(tmp_path: Path, base: Path, adapters: Path, phantoms: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_tensors

    proof = run(base, adapters, phantoms, tmp_path / "model", ModelConfig(dtype="bfloat16"))
    assert proof["dtype"] == "bfloat16"
    tensors = load_tensors(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    expected, changed = by_hand(base, adapters)
    for name in changed:
        got = tensors[name].double().numpy()
        # one rounding to 8 bits of mantissa for the base and for each adapter
        np.testing.assert_allclose(got, expected[name], rtol=3 * 2**-8, atol=3e-3, err_msg=name)


Place = Literal["merged", "unmerged"]


@pytest.mark.parametrize("place", ["merged", "unmerged"])
def test_a_model_that_says_something_else_is_not_written(
    tmp_path: Path, base: Path, adapters: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    """One weight is changed between merging and the proof, on either side."""

    def load(folder: Path, dtype: str, stages: Any = ()) -> Any:
        import torch

        model = load_model(folder, dtype, stages)
        if not stages and (folder == base) == (place == "unmerged"):
            with torch.no_grad():
                model.model.language_model.layers[1].mlp.up_proj.weight[3] += 1.0
        return model

    monkeypatch.setattr("medforge.merge.load_model", load)
    with pytest.raises(RuntimeError, match="merged model differs from base plus adapters"):
        run(base, adapters, phantoms, tmp_path / "model", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_proof_leaves_the_model_that_was_there(
    tmp_path: Path, base: Path, adapters: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "model")
    monkeypatch.setattr("medforge.merge.TOLERANCE", {"float32": -1.0})
    with pytest.raises(RuntimeError, match="nothing was written"):
        run(base, adapters, phantoms, tmp_path / "model", CONFIG)
    assert tree_digest(tmp_path / "model") == tree_digest(base)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_proof_over_nan_fails(
    tmp_path: Path, base: Path, adapters: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN is not larger than any tolerance; it must not pass for that."""
    import torch

    def load(folder: Path, dtype: str, stages: Any = ()) -> Any:
        model = load_model(folder, dtype, stages)
        with torch.no_grad():
            model.model.language_model.norm.weight[:] = float("nan")
        return model

    monkeypatch.setattr("medforge.merge.load_model", load)
    with pytest.raises(RuntimeError, match="merged model differs"):
        run(base, adapters, phantoms, tmp_path / "model", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_stack_is_an_error(tmp_path: Path, base: Path, phantoms: Path) -> None:
    (tmp_path / "adapters").mkdir()
    for folder in (tmp_path / "adapters", tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"holds no adapter|no such folder"):
            run(base, folder, phantoms, tmp_path / "model", CONFIG)
    assert not (tmp_path / "model").exists()
