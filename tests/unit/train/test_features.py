"""Kept features: the same losses and gradients as without; files that are damaged, full or shared."""

from __future__ import annotations

import errno
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medforge.models.encode import Encoder
from medforge.models.load import load_model
from medforge.models.rows import Batch
from medforge.train.features import FeatureCache, Features, Kind, Ready, tower_digest
from tests.unit.models.passes import (
    PICTURES,
    PIXELS,
    adapted,
    batches,
    distance,
    gradients,
    some_cases,
    stock,
)

GRID = (1, 4, 6)
TUNE: dict[Kind, list[str]] = {"before": ["vision_merger", "language_attention"], "after": ["language_attention"]}


@pytest.fixture(scope="module")
def encoders(tiny_models: dict[str, Path]) -> dict[str, Encoder]:
    return {family: Encoder(folder, *PIXELS) for family, folder in tiny_models.items()}


def adapted_for(tiny_models: dict[str, Path], family: str, kind: Kind) -> Any:
    return adapted(load_model(tiny_models[family], "float32").cpu(), family, TUNE[kind])


class Asked:
    """The images whose pixels were asked for."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.images: list[str] = []

    def __call__(self, image: str) -> np.ndarray:
        self.images.append(image)
        return self.encoder.see([PICTURES[image]]).pixel_values


def loss_of(model: Any, features: Features, cut: Sequence[Batch], pixels: Any) -> tuple[float, dict[str, Any]]:
    """The loss over the micro-batches, and its gradients."""
    import torch

    from medforge.models.forward import answer_losses, hidden_states

    total = 0.0
    for batch in cut:
        levels = features.levels(batch, features.ready(batch, pixels), torch.device("cpu"))
        loss = answer_losses(stock(model), hidden_states(stock(model), batch, levels), batch).sum()
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


# --- the same results


@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_kept_features_change_neither_loss_nor_gradients(
    tiny_models: dict[str, Path], encoders: dict[str, Encoder], family: str, kind: Kind, tmp_path: Path
) -> None:
    from medforge.models.tower import Tower

    encoder = encoders[family]
    model = adapted_for(tiny_models, family, kind)
    tower = Tower(stock(model))
    # an image in several rows and micro-batches, two in one row, and a row without any
    cut = batches(encoder, [one.item for one in some_cases(encoder)], tokens=250, share=True)
    assert len(cut) > 1
    asked = Asked(encoder)
    whole = loss_of(model, Features(tower, None, None), cut, asked)
    assert len(asked.images) == sum(len(batch.images) for batch in cut)
    frozen = loss_of(model, Features(tower, kind, None), cut, asked)
    cache = FeatureCache(tmp_path, "tower")
    asked.images.clear()
    written = loss_of(model, Features(tower, kind, cache), cut, asked)
    assert sorted(set(asked.images)) == ["a", "b"]  # then kept
    asked.images.clear()
    held = loss_of(model, Features(tower, kind, cache), cut, asked)
    read = loss_of(model, Features(tower, kind, FeatureCache(tmp_path, "tower")), cut, asked)
    assert asked.images == []
    for loss, found in (frozen, written, held, read):
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert distance(found, whole[1]) < 1e-5


def test_some_kept_and_some_not(tiny_models: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path) -> None:
    from medforge.models.tower import Tower

    encoder = encoders["qwen3-vl"]
    model = adapted_for(tiny_models, "qwen3-vl", "before")
    tower = Tower(stock(model))
    cases = some_cases(encoder)
    only_b = batches(encoder, [cases[1].item])
    everything = batches(encoder, [one.item for one in cases])
    cache, asked = FeatureCache(tmp_path, "tower"), Asked(encoder)
    loss_of(model, Features(tower, "before", cache), only_b, asked)
    assert asked.images == ["b"]
    expected = loss_of(model, Features(tower, None, None), everything, Asked(encoder))
    asked.images.clear()
    found = loss_of(model, Features(tower, "before", cache), everything, asked)
    assert set(asked.images) == {"a"}
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


def test_a_tuned_tower_gets_gradients(tiny_models: dict[str, Path], encoders: dict[str, Encoder]) -> None:
    from medforge.models.tower import Tower

    model = adapted(load_model(tiny_models["qwen2.5-vl"], "float32").cpu(), "qwen2.5-vl", ["vision_tower"])
    encoder = encoders["qwen2.5-vl"]
    cut = batches(encoder, [some_cases(encoder)[0].item])
    _, found = loss_of(model, Features(Tower(stock(model)), None, None), cut, Asked(encoder))
    assert all(float(gradient.norm()) > 0 for gradient in found.values())
    with pytest.raises(AssertionError):  # they change with every step, so they cannot be kept
        Features(Tower(stock(model)), None, FeatureCache(Path("x"), "x"))


def test_no_images_no_features(tiny_models: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path) -> None:
    from medforge.models.tower import Tower

    encoder = encoders["qwen3-vl"]
    (batch,) = batches(encoder, [some_cases(encoder)[4].item])
    model = load_model(tiny_models["qwen3-vl"], "float32")
    features = Features(Tower(model), "after", FeatureCache(tmp_path, "x"))
    assert features.ready(batch, Asked(encoder)) == Ready({}, {})
    assert features.levels(batch, Ready({}, {}), "cpu") == []
    assert list(tmp_path.rglob("*")) == []


# --- names


@pytest.fixture
def levels() -> list[Any]:
    import torch

    torch.manual_seed(0)
    return [torch.randn(6, 8), torch.randn(6, 8)]


def same(found: list[Any] | None, expected: list[Any]) -> bool:
    import torch

    return (
        found is not None
        and len(found) == len(expected)
        and all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(found, expected, strict=True))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_put_is_got_from_memory_and_from_disk(levels: list[Any], tmp_path: Path, dtype: str) -> None:
    import torch

    kept = [level.to(getattr(torch, dtype)) for level in levels]
    cache = FeatureCache(tmp_path, "t")
    cache.put("image", GRID, kept)
    assert same(cache.get("image", GRID), kept)
    assert same(FeatureCache(tmp_path, "t").get("image", GRID), kept)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["image-1x4x6.safetensors"]


def test_a_view_or_a_gradient_is_not_kept(levels: list[Any], tmp_path: Path) -> None:
    """A kept view would hold the batch's whole storage, and change with it."""
    part = levels[0].requires_grad_()[2:4] * 1.0
    expected = part.detach().clone()
    cache = FeatureCache(tmp_path, "t")
    cache.put("image", GRID, [part])
    part.data.zero_()
    found = cache.get("image", GRID)
    assert found is not None
    assert same(found, [expected])
    assert not found[0].requires_grad
    assert found[0].untyped_storage().nbytes() == expected.nbytes


def test_many_levels_keep_their_order(tmp_path: Path) -> None:
    import torch

    kept = [torch.full((2, 2), float(number)) for number in range(12)]
    FeatureCache(tmp_path, "t").put("image", GRID, kept)
    assert same(FeatureCache(tmp_path, "t").get("image", GRID), kept)


def test_another_image_grid_or_tower_is_another_name(levels: list[Any], tmp_path: Path) -> None:
    FeatureCache(tmp_path, "tower").put("image", GRID, levels)
    fresh = FeatureCache(tmp_path, "tower")
    assert fresh.get("other", GRID) is None
    assert fresh.get("image", (1, 6, 4)) is None  # as many patches in another shape: positions differ
    assert FeatureCache(tmp_path, "another").get("image", GRID) is None
    assert same(fresh.get("image", list(GRID)), levels)


def test_the_digest_is_of_what_decides_the_features(tiny_models: dict[str, Path]) -> None:
    import torch

    folder = tiny_models["qwen3-vl"]
    model = load_model(folder, "float32")
    before, after = tower_digest(model, "before"), tower_digest(model, "after")
    assert before != after
    assert (tower_digest(load_model(folder, "float32"), "before"), len(before)) == (before, 64)
    for other in (load_model(tiny_models["qwen2-vl"], "float32"), load_model(folder, "bfloat16")):
        assert {tower_digest(other, "before"), tower_digest(other, "after")}.isdisjoint({before, after})

    def changed(name: str) -> tuple[bool, bool]:
        """Whether the digests (before, after) change with a weight."""
        weight = model.get_parameter(name)
        with torch.no_grad():
            weight.flatten()[0] += 1
            found = tower_digest(model, "before") != before, tower_digest(model, "after") != after
            weight.flatten()[0] -= 1
        return found

    assert changed("model.language_model.layers.0.self_attn.q_proj.weight") == (False, False)
    assert changed("model.visual.merger.linear_fc1.weight") == (False, True)
    assert changed("model.visual.deepstack_merger_list.0.linear_fc1.weight") == (False, True)
    assert changed("model.visual.blocks.0.attn.qkv.weight") == (True, True)
    assert changed("model.visual.patch_embed.proj.weight") == (True, True)


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_adapters_outside_of_the_frozen_part_leave_the_digest(tiny_models: dict[str, Path], family: str) -> None:
    """A stage that is resumed has its adapters on, and must find what it kept."""
    plain = load_model(tiny_models[family], "float32")
    before, after = tower_digest(plain, "before"), tower_digest(plain, "after")
    merger = stock(adapted_for(tiny_models, family, "before"))
    assert tower_digest(merger, "before") == before
    assert tower_digest(merger, "after") != after  # its output is another
    language = stock(adapted_for(tiny_models, family, "after"))
    assert (tower_digest(language, "before"), tower_digest(language, "after")) == (before, after)
    tower = stock(adapted(load_model(tiny_models[family], "float32"), family, ["vision_tower"]))
    assert tower_digest(tower, "before") != before


# --- files in trouble


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, None], ids=["empty", "rubbish", "cut"])
def test_a_damaged_file_is_made_anew(levels: list[Any], tmp_path: Path, damage: bytes | None) -> None:
    FeatureCache(tmp_path, "t").put("image", GRID, levels)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    cache = FeatureCache(tmp_path, "t")
    assert cache.get("image", GRID) is None
    assert not path.exists()
    cache.put("image", GRID, levels)
    assert same(FeatureCache(tmp_path, "t").get("image", GRID), levels)


def no_space(kind: str) -> Exception:
    from safetensors import SafetensorError

    if kind == "system":
        return OSError(errno.ENOSPC, "No space left on device")
    if kind == "quota":
        return OSError(errno.EDQUOT, "Disk quota exceeded")
    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("kind", ["system", "quota", "safetensors"])
def test_a_full_disk_ends_the_writing_only(
    levels: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    FeatureCache(tmp_path, "t").put("earlier", GRID, levels)
    cache = FeatureCache(tmp_path, "t")
    tried: list[Path] = []

    def full(_: Any, path: Path) -> None:
        tried.append(Path(path))
        Path(path).write_bytes(b"half")
        raise no_space(kind)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    cache.put("one", GRID, levels)
    cache.put("two", GRID, levels)
    assert cache.full
    assert len(tried) == 1
    assert capsys.readouterr().out.count("no space for more features") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["earlier-1x4x6.safetensors"]
    assert all(same(cache.get(image, GRID), levels) for image in ("one", "two", "earlier"))
    assert FeatureCache(tmp_path, "t").get("one", GRID) is None


def test_another_error_is_not_hidden(levels: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    cache = FeatureCache(tmp_path, "t")
    with pytest.raises(PermissionError):
        cache.put("image", GRID, levels)
    assert not cache.full
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupted_write_leaves_nothing_to_read(levels: list[Any], tmp_path: Path) -> None:
    """What a killed process wrote has another name."""
    FeatureCache(tmp_path, "t").put("image", GRID, levels)
    (path,) = tmp_path.rglob("*.safetensors")
    path.rename(path.with_name(f".{path.name}.77.tmp"))
    assert FeatureCache(tmp_path, "t").get("image", GRID) is None


def _write_and_read(folder: Path, seed: int) -> int:
    """How many features that another process may be writing were read and were right. Run in a process of its own."""
    import torch

    order = np.random.default_rng(seed)
    right = 0
    for _ in range(15):
        for number in order.permutation(6).tolist():
            cache = FeatureCache(folder, "t")  # with an empty memory
            expected = torch.full((64, 64), float(number))
            found = cache.get(f"image{number}", GRID)
            if found is not None:
                assert torch.equal(found[0], expected)
                right += 1
            cache.put(f"image{number}", GRID, [expected])
    return right


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        right = pool.starmap(_write_and_read, [(tmp_path, 0), (tmp_path, 1)])
    assert all(count >= 84 for count in right)  # all but the first reading of each image
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == [f"image{number}-1x4x6.safetensors" for number in range(6)]
