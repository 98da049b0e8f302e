"""A stage of training: what it tunes, what it writes, and that nothing of it is left to chance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medforge.config import LoraConfig, ModelConfig
from medforge.dataset import Dataset, choose
from medforge.files import list_files, read_json, sha256_file, tree_digest, write_json
from medforge.models.encode import Encoder, collate
from medforge.models.load import load_model, stack
from tests.unit.models.examples import token_losses
from tests.unit.train.runs import (
    MODEL,
    SEED,
    STAGE,
    about,
    changed,
    checkpoint,
    checkpoints,
    close,
    copy_samples,
    figures,
    same_files,
    train,
    weights_are_those_of,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Path:
    """The folder of a run from its start to its end; its adapter is out/01-see."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(folder, base, phantoms, draw=True)
    return folder


def test_two_runs_write_the_same_bytes(tmp_path: Path, base: Path, phantoms: Path, unbroken: Path) -> None:
    same_files(train(tmp_path, base, phantoms, draw=True), unbroken / "out" / "01-see")


def test_another_seed_trains_another_adapter(tmp_path: Path, base: Path, phantoms: Path, unbroken: Path) -> None:
    other = train(tmp_path, base, phantoms, seed=4)
    name = "adapter_model.safetensors"
    assert sha256_file(other / name) != sha256_file(unbroken / "out" / "01-see" / name)


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_features_give_the_same_weights(tmp_path: Path, base: Path, phantoms: Path, workers: int) -> None:
    """Which images are kept when a step is prepared depends on how fast the threads are, and on runs before; neither
    may matter, also where dropout draws random numbers in the merger that is tuned."""
    ends = {}
    for name in ("off", "on", "filled"):
        if name == "filled":
            shutil.copytree(tmp_path / "on" / "work" / "features", tmp_path / "filled" / "work" / "features")
        speed = {"cache_features": "off" if name == "off" else "on", "workers": workers}
        train(tmp_path / name, base, phantoms, changed(speed=speed, generate_samples=0))
        ends[name] = sha256_file(checkpoint(tmp_path / name, 6) / "weights.safetensors")
    assert len(list((tmp_path / "on" / "work" / "features").rglob("*.safetensors"))) > 10
    assert ends["off"] == ends["on"] == ends["filled"]


def test_how_often_is_validated_does_not_change_the_weights(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path
) -> None:
    train(tmp_path, base, phantoms, changed(evaluate_every=1, generate_samples=0))
    ends = [checkpoint(folder, 6) for folder in (tmp_path, unbroken)]
    for name in ("weights", "exp_avg", "exp_avg_sq", "step"):
        assert len({sha256_file(end / f"{name}.safetensors") for end in ends}) == 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_the_named_parts_are_trained(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    import torch
    from safetensors.torch import load_file

    loaded: list[Any] = []

    def kept(*args: Any, **rest: Any) -> Any:
        loaded.append(load_model(*args, **rest))
        return loaded[-1]

    monkeypatch.setattr("medforge.train.prepare.load_model", kept)
    adapter = train(tmp_path, base, phantoms, changed(method=method))
    weights = load_file(adapter / ("weights.safetensors" if method == "full" else "adapter_model.safetensors"))
    mergers = {f"model.visual.{name}.linear_fc{n}" for name in ("merger", "deepstack_merger_list.0") for n in (1, 2)}
    mlps = {f"model.language_model.layers.{n}.mlp.{kind}_proj" for n in range(3) for kind in ("gate", "up", "down")}
    fresh = load_model(base, "float32").state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in loaded[0].state_dict().items()}
    assert set(fresh) <= set(after)
    moved = {name for name in fresh if not torch.equal(fresh[name], after[name])}
    if method == "full":
        assert {name.rpartition(".")[0] for name in weights} == mergers | mlps
        assert moved == set(weights)
        assert all(torch.equal(after[name], weights[name]) for name in weights)
        assert stack(tmp_path / "out") == [adapter]
    else:
        layers = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in weights}
        assert layers == mergers | mlps
        assert len(weights) == 2 * len(layers)
        # B starts at zero, so that a B that is not zero was trained
        assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
        assert moved == set()
    assert about(adapter)["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())


def first_loss(base: Path, dataset: Path, adapters: Sequence[Path], samples: int) -> float:
    """The mean loss over the answers' tokens of the training samples, worked out by hand."""
    data = Dataset.open(dataset)
    encoder = Encoder(base, MODEL.min_pixels, MODEL.max_pixels)
    chosen = choose(data.samples("train"), samples, SEED)
    batch = collate([encoder.encode(s, data.images(s)) for s in chosen], encoder.image_id, encoder.pad_id)
    rows = token_losses(load_model(base, "float32", adapters).cpu(), batch)
    return float(np.mean([loss for row in rows for loss in row]))


WHOLE_BATCH: dict[str, Any] = {
    "lora": LoraConfig(r=4).model_dump(),
    "samples": 8,
    "batch_size": 8,
    "steps": 1,
    "evaluate_every": 1,
}


@pytest.mark.parametrize("tokens", [8192, 64])
def test_the_loss_is_the_mean_over_the_answers_tokens(
    tmp_path: Path, base: Path, phantoms: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step sees the base, and with all samples in one step their order does not matter."""
    from medforge.train import loop

    cuts: list[int] = []
    one_step = loop.one_step

    def counted(parts: Any, works: Any, *rest: Any) -> Any:
        cuts.append(len(works))
        return one_step(parts, works, *rest)

    monkeypatch.setattr(loop, "one_step", counted)
    adapter = train(tmp_path, base, phantoms, changed(**WHOLE_BATCH, micro_tokens=tokens))
    assert figures(adapter, "loss")[1] == pytest.approx(first_loss(base, phantoms, [], 8), rel=1e-5)
    assert (cuts[0] > 2) is (tokens == 64)


def test_a_stage_starts_from_the_adapters_before_it(tmp_path: Path, base: Path, phantoms: Path, adapters: Path) -> None:
    adapter = train(tmp_path, base, phantoms, changed(name="next", **WHOLE_BATCH), before=adapters)
    loss = figures(adapter, "loss")[1]
    assert loss == pytest.approx(first_loss(base, phantoms, stack(adapters), 8), rel=1e-4)
    assert loss != pytest.approx(first_loss(base, phantoms, [], 8), rel=1e-3)
    assert [path.name for path in stack(tmp_path / "out")] == ["01-see", "02-say", "03-next"]
    for path in stack(adapters):
        same_files(path, tmp_path / "out" / path.name)
    assert about(adapter)["before"] == {path.name: tree_digest(path) for path in stack(adapters)}


def test_a_stage_starts_from_layers_that_one_before_it_tuned(tmp_path: Path, base: Path, phantoms: Path) -> None:
    whole = changed(name="whole", method="full", steps=2, learning_rate=1e-3)
    train(tmp_path / "first", base, phantoms, whole)
    before = tmp_path / "first" / "out"
    adapter = train(tmp_path / "next", base, phantoms, changed(name="next", **WHOLE_BATCH), before=before)
    loss = figures(adapter, "loss")[1]
    assert loss == pytest.approx(first_loss(base, phantoms, stack(before), 8), rel=1e-4)
    assert loss != pytest.approx(first_loss(base, phantoms, [], 8), rel=1e-3)


def test_the_loss_falls(unbroken: Path) -> None:
    losses = list(figures(unbroken / "out" / "01-see", "eval_loss").values())
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16(tmp_path: Path, base: Path, phantoms: Path, method: str) -> None:
    """What is trained is kept in float32: updates of a thousandth would be lost in a bfloat16 weight."""
    import torch
    from safetensors.torch import load_file

    stage = changed(method=method, learning_rate=1e-3 if method == "full" else 4e-3, batch_size=8)
    adapter = train(tmp_path, base, phantoms, stage, model=ModelConfig(dtype="bfloat16"))
    losses = list(figures(adapter, "eval_loss").values())
    assert all(np.isfinite(losses))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]
    weights = load_file(adapter / ("weights.safetensors" if method == "full" else "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    plain = train(tmp_path / "float32", base, phantoms, stage)
    close(figures(adapter, "loss"), figures(plain, "loss"), 0.02)
    load_model(base, "bfloat16", [adapter])


def test_what_is_written(unbroken: Path, base: Path, phantoms: Path) -> None:
    adapter = unbroken / "out" / "01-see"
    assert list_files(adapter) == ["adapter_config.json", "adapter_model.safetensors", "curves.png", "stage.json"]
    assert {path.stat().st_mode & 0o777 for path in adapter.iterdir()} == {0o644}
    told = about(adapter)
    assert told["stage"] == STAGE.model_dump()
    assert (told["seed"], told["steps"], told["best_by"], told["best_step"]) == (SEED, 6, "loss", 6)
    assert told["base"] == tree_digest(base)
    assert told["data"] == Dataset.open(phantoms).digest
    assert told["before"] == {}
    assert told["samples"] == {"train": 40, "validation": 6}
    last = next(row for row in reversed(told["curves"]) if "eval_loss" in row)
    assert told["validation"] == {name.removeprefix("eval_"): v for name, v in last.items() if name != "step"}
    assert told["eval_loss"] == told["validation"]["loss"]
    with Image.open(adapter / "curves.png") as image:
        image.verify()


def test_nothing_that_is_written_names_a_place_or_a_time(unbroken: Path, base: Path) -> None:
    adapter = unbroken / "out" / "01-see"
    words = (adapter / "adapter_config.json").read_text() + (adapter / "stage.json").read_text()
    for place in (base, unbroken, Path.cwd()):
        assert str(place) not in words
    kept = {"step", "loss", "learning_rate", "grad_norm"}
    kept |= {f"eval_{name}" for name in ("loss", "perplexity", "accuracy", "open_accuracy", "closed_accuracy")}
    found = {name for row in about(adapter)["curves"] for name in row}
    assert {"loss", "eval_loss"} <= found <= kept


def test_the_order_of_a_set_is_not_written(unbroken: Path) -> None:
    """peft keeps the layers in a set, which each process lists in another order."""
    layers = read_json(unbroken / "out" / "01-see" / "adapter_config.json")["target_modules"]
    assert len(layers) == 13
    assert layers == sorted(layers)


def test_json_of_a_stage_is_strict(unbroken: Path, tmp_path: Path) -> None:
    """No NaN and no infinity, which other readers of JSON refuse."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((unbroken / "out" / "01-see" / "stage.json").read_text(), parse_constant=refuse)
    write_json(tmp_path / "check.json", about(unbroken / "out" / "01-see"))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"steps": None, "epochs": 1.0}, 3),  # 10 samples in batches of 4
        ({"steps": None, "epochs": 2.0}, 5),
        ({"steps": None, "epochs": 0.01}, 1),
    ],
)
def test_epochs_are_passes_over_the_samples(
    tmp_path: Path, base: Path, phantoms: Path, changes: dict[str, Any], steps: int
) -> None:
    few: dict[str, Any] = {"samples": 10, "validation_samples": 1, "generate_samples": 0}
    told = about(train(tmp_path, base, phantoms, changed(**few, **changes)))
    assert told["steps"] == steps == max(row["step"] for row in told["curves"])
    assert told["samples"]["train"] == 10


def test_a_name_stands_once_in_a_stack(tmp_path: Path, base: Path, phantoms: Path, adapters: Path) -> None:
    with pytest.raises(ValueError, match=r"stage 'say' is in .* already"):
        train(tmp_path, base, phantoms, changed(name="say"), before=adapters)
    assert list(tmp_path.iterdir()) == []


def test_no_training_samples_is_an_error(tmp_path: Path, base: Path, phantoms: Path) -> None:
    dataset = copy_samples(phantoms, tmp_path / "dataset", lambda sample: sample.split != "train")
    with pytest.raises(ValueError, match="dataset: the train split is empty"):
        train(tmp_path / "run", base, dataset)
    assert not (tmp_path / "run").exists()


def test_a_view_that_holds_nothing_is_an_error(tmp_path: Path, base: Path, phantoms: Path) -> None:
    with pytest.raises(
        ValueError, match=r"stage 'see': mix.0: none of the \d+ training samples .*'languages': \['zh'\]"
    ):
        train(tmp_path, base, phantoms, changed(mix=[{"languages": ["zh"]}]))
    assert list(tmp_path.iterdir()) == []


def test_without_a_validation_split_the_last_step_is_kept(tmp_path: Path, base: Path, phantoms: Path) -> None:
    dataset = copy_samples(phantoms, tmp_path / "dataset", lambda sample: sample.split == "train")
    adapter = train(tmp_path, base, dataset, changed(steps=3, best_by="accuracy"), draw=True)
    told = about(adapter)
    assert (told["best_step"], told["eval_loss"], told["samples"]["validation"]) == (3, None, 0)
    assert told["validation"] == {}
    assert told["best_by"].startswith("last step")
    assert [row["step"] for row in told["curves"]] == [2, 3]
    assert checkpoints(tmp_path) == [2, 3]
    weights_are_those_of(adapter, checkpoint(tmp_path, 3))


def test_a_part_that_the_model_lacks_is_an_error(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medforge.models.families import FAMILIES

    monkeypatch.setitem(FAMILIES["qwen3-vl"].targets, "vision_merger", "nothing")
    with pytest.raises(ValueError, match="vision_merger: no linear layer"):
        train(tmp_path, base, phantoms)
    assert not (tmp_path / "out").exists()


def test_choosing_keeps_the_order_and_follows_the_seed(phantoms: Path) -> None:
    samples = Dataset.open(phantoms).samples("train")
    ids = [sample.id for sample in samples]
    picked = [[sample.id for sample in choose(samples, 20, seed)] for seed in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2]
    for one in picked:
        assert len(set(one)) == 20
        assert one == [name for name in ids if name in set(one)]
    assert choose(samples, None, 0) == choose(samples, len(samples) + 1, 0) == samples
