"""A stage of training: what it tunes, what it writes, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medforge.config import LoraConfig, ModelConfig, StageConfig
from medforge.dataset import Dataset, choose
from medforge.dataset_writer import write_dataset
from medforge.files import link_tree, list_files, read_json, sha256_file, tree_digest, write_json
from medforge.models.encode import Encoder, Seen, collate
from medforge.models.load import load_model, stack
from medforge.train.data import EncodedSamples
from medforge.train.stage import Inputs, run
from tests.unit.models.examples import token_losses

MODEL = ModelConfig()
STAGE = StageConfig(
    name="see",
    tune=["vision_merger", "language_mlp"],
    lora=LoraConfig(r=4, alpha=8, dropout=0.1),  # dropout draws from the random state that a resume has to restore
    steps=6,
    batch_size=4,
    samples=40,
    learning_rate=4e-3,
    evaluate_every=2,
    validation_samples=6,
)


def changed(**changes: Any) -> StageConfig:
    return StageConfig.model_validate(STAGE.model_dump() | changes)


def train(folder: Path, base: Path, dataset: Path, stage: StageConfig = STAGE, before: Path | None = None) -> Path:
    """Train in `folder`; the adapter's folder is returned."""
    run(Inputs(base, dataset, before), folder / "out", folder / "work", folder / "logs", stage, MODEL, seed=3)
    return stack(folder / "out")[-1]


def same_files(one: Path, other: Path) -> None:
    assert {name: sha256_file(one / name) for name in list_files(one)} == {
        name: sha256_file(other / name) for name in list_files(other)
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Path:
    """The folder of a run from its start to its end; its adapter is out/01-see."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(folder, base, phantoms)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Path:
    """The work folder of the same run, killed in another process after the checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("killed")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from medforge.config import ModelConfig, StageConfig\n"
        "from medforge.train import callbacks, stage\n"
        "mark = callbacks.MarkWhole.on_save\n"
        "def on_save(self, args, state, control, **rest):\n"
        "    mark(self, args, state, control, **rest)\n"
        "    if state.global_step == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "callbacks.MarkWhole.on_save = on_save\n"
        "base, data, folder = map(Path, sys.argv[1:4])\n"
        "settings = StageConfig.model_validate_json(sys.argv[4])\n"
        "given = stage.Inputs(base, data, None)\n"
        "stage.run(given, folder / 'out', folder / 'work', folder / 'logs', settings, ModelConfig(), 3)\n"
    )
    command = [sys.executable, "-c", script, str(base), str(phantoms), str(folder), STAGE.model_dump_json()]
    # other hash seeds must not matter either: sets have another order in each process
    ended = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "77"}, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (folder / "out").exists()
    return folder / "work"


def about(adapter: Path) -> dict[str, Any]:
    return dict(read_json(adapter / "stage.json"))


def test_two_runs_write_the_same_bytes(tmp_path: Path, base: Path, phantoms: Path, unbroken: Path) -> None:
    same_files(train(tmp_path, base, phantoms), unbroken / "out" / "01-see")


def test_another_seed_trains_another_adapter(tmp_path: Path, base: Path, phantoms: Path, unbroken: Path) -> None:
    run(Inputs(base, phantoms, None), tmp_path / "out", tmp_path / "work", tmp_path / "logs", STAGE, MODEL, seed=4)
    weights = [folder / "out" / "01-see" / "adapter_model.safetensors" for folder in (tmp_path, unbroken)]
    assert sha256_file(weights[0]) != sha256_file(weights[1])


def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path, killed: Path
) -> None:
    """Also in another folder, and past a newer checkpoint that the kill cut short."""
    shutil.copytree(killed, tmp_path / "work")
    torn = tmp_path / "work" / "checkpoint-6"
    shutil.copytree(tmp_path / "work" / "checkpoint-4", torn)
    (torn / "whole.json").unlink()
    (torn / "optimizer.pt").write_bytes((torn / "optimizer.pt").read_bytes()[:1000])
    same_files(train(tmp_path, base, phantoms), unbroken / "out" / "01-see")


def test_a_checkpoint_that_was_half_deleted_is_passed_over(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path, killed: Path
) -> None:
    shutil.copytree(killed, tmp_path / "work")
    (tmp_path / "work" / "checkpoint-4" / "optimizer.pt").unlink()
    same_files(train(tmp_path, base, phantoms), unbroken / "out" / "01-see")


def test_a_run_killed_at_its_end_only_writes_its_result(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    def no_step(*_: Any, **__: Any) -> None:
        raise AssertionError("all steps were done")

    link_tree(unbroken / "work", tmp_path / "work")
    monkeypatch.setattr(Trainer, "training_step", no_step)
    same_files(train(tmp_path, base, phantoms), unbroken / "out" / "01-see")


def test_resuming_takes_up_the_newest_checkpoint(
    tmp_path: Path, base: Path, phantoms: Path, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other tests would pass as well if everything was trained anew."""
    from transformers import Trainer

    steps: list[int] = []
    step = Trainer.training_step

    def counted(self: Any, *args: Any, **rest: Any) -> Any:
        steps.append(self.state.global_step)
        return step(self, *args, **rest)

    shutil.copytree(killed, tmp_path / "work")
    monkeypatch.setattr(Trainer, "training_step", counted)
    train(tmp_path, base, phantoms)
    assert steps == [4, 5]


def test_only_the_named_parts_are_trained(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    loaded: list[Any] = []

    def kept(*args: Any) -> Any:
        loaded.append(load_model(*args))
        return loaded[-1]

    monkeypatch.setattr("medforge.train.stage.load_model", kept)
    adapter = train(tmp_path, base, phantoms)
    weights = load_file(adapter / "adapter_model.safetensors")
    layers = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in weights}
    mergers = {f"model.visual.{name}.linear_fc{n}" for name in ("merger", "deepstack_merger_list.0") for n in (1, 2)}
    mlps = {f"model.language_model.layers.{n}.mlp.{kind}_proj" for n in range(3) for kind in ("gate", "up", "down")}
    assert layers == mergers | mlps
    assert len(weights) == 2 * len(layers)
    # B starts at zero, so that a B that is not zero was trained
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    assert about(adapter)["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    fresh = load_model(base, "float32").state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in loaded[0].state_dict().items()}
    assert set(fresh) <= set(after)
    assert all(torch.equal(fresh[name], after[name]) for name in fresh)


def first_loss(base: Path, dataset: Path, adapters: list[Path], samples: int, seed: int) -> float:
    """The mean loss over the answers' tokens of the training samples, worked out by hand."""
    data = Dataset.open(dataset)
    encoder = Encoder(base, MODEL.min_pixels, MODEL.max_pixels)
    chosen = choose(data.samples("train"), samples, seed)
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


@pytest.mark.parametrize("split", [{"batch_size": 8}, {"batch_size": 2, "accumulate": 4}])
def test_the_loss_is_the_mean_over_the_answers_tokens(
    tmp_path: Path, base: Path, phantoms: Path, split: dict[str, int]
) -> None:
    """The first step sees the base, and with one batch of all samples their order does not matter."""
    adapter = train(tmp_path, base, phantoms, changed(**(WHOLE_BATCH | split)))
    loss = next(row["loss"] for row in about(adapter)["curves"] if "loss" in row)
    assert loss == pytest.approx(first_loss(base, phantoms, [], 8, 3), rel=1e-4)


def test_a_stage_starts_from_the_adapters_before_it(tmp_path: Path, base: Path, phantoms: Path, adapters: Path) -> None:
    adapter = train(tmp_path, base, phantoms, changed(name="next", **WHOLE_BATCH), before=adapters)
    loss = next(row["loss"] for row in about(adapter)["curves"] if "loss" in row)
    assert loss == pytest.approx(first_loss(base, phantoms, stack(adapters), 8, 3), rel=1e-4)
    assert loss != pytest.approx(first_loss(base, phantoms, [], 8, 3), rel=1e-3)
    names = [path.name for path in stack(tmp_path / "out")]
    assert names == ["01-see", "02-say", "03-next"]
    for path in stack(adapters):
        same_files(path, tmp_path / "out" / path.name)
    assert about(adapter)["before"] == {path.name: tree_digest(path) for path in stack(adapters)}


def test_the_loss_falls(unbroken: Path) -> None:
    losses = [row["eval_loss"] for row in about(unbroken / "out" / "01-see")["curves"] if "eval_loss" in row]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_the_best_checkpoint_is_what_is_kept(tmp_path: Path, base: Path, phantoms: Path) -> None:
    """A learning rate that is far too large makes the validation loss rise; an interruption does not hide it."""
    stage = changed(learning_rate=20.0, schedule="constant", warmup=0.0)
    adapter = train(tmp_path / "one", base, phantoms, stage)
    told = about(adapter)
    losses = {row["step"]: row["eval_loss"] for row in told["curves"] if "eval_loss" in row}
    assert told["best_step"] == min(losses, key=lambda step: losses[step]) < told["steps"] == 6
    assert told["eval_loss"] == min(losses.values())
    best = tmp_path / "one" / "work" / f"checkpoint-{told['best_step']}"
    assert sha256_file(best / "adapter_model.safetensors") == sha256_file(adapter / "adapter_model.safetensors")
    # the work folder in another place: the best checkpoint's path in the last one's state is of no use there
    shutil.move(tmp_path / "one" / "work", tmp_path / "two" / "work")
    same_files(train(tmp_path / "two", base, phantoms, stage), adapter)


def test_what_is_written(unbroken: Path, base: Path, phantoms: Path) -> None:
    adapter = unbroken / "out" / "01-see"
    assert list_files(adapter) == ["adapter_config.json", "adapter_model.safetensors", "curves.png", "stage.json"]
    assert {path.stat().st_mode & 0o777 for path in adapter.iterdir()} == {0o644}
    told = about(adapter)
    assert told["stage"] == STAGE.model_dump()
    assert (told["seed"], told["steps"], told["best_by"]) == (3, 6, "eval_loss")
    assert told["base"] == tree_digest(base)
    assert told["data"] == Dataset.open(phantoms).digest
    assert told["before"] == {}
    assert told["samples"] == {"train": 40, "validation": 6}
    with Image.open(adapter / "curves.png") as image:
        image.verify()


def test_nothing_that_is_written_names_a_place_or_a_time(unbroken: Path, base: Path) -> None:
    adapter = unbroken / "out" / "01-see"
    words = (adapter / "adapter_config.json").read_text() + (adapter / "stage.json").read_text()
    for place in (base, unbroken, Path.cwd()):
        assert str(place) not in words
    kept = {"step", "loss", "eval_loss", "learning_rate", "grad_norm"}
    assert {name for row in about(adapter)["curves"] for name in row} == kept


def test_the_order_of_a_set_is_not_written(unbroken: Path) -> None:
    """peft keeps the layers in a set, which each process lists in another order."""
    layers = read_json(unbroken / "out" / "01-see" / "adapter_config.json")["target_modules"]
    assert len(layers) == 13
    assert layers == sorted(layers)


def test_the_logs_are_tensorboards(unbroken: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(unbroken / "logs"))
    events.Reload()
    wanted = [row["eval_loss"] for row in about(unbroken / "out" / "01-see")["curves"] if "eval_loss" in row]
    assert [event.value for event in events.Scalars("eval/loss")] == pytest.approx(wanted)
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"steps": 3, "epochs": None}, 3),
        ({"steps": None, "epochs": 1.0}, 3),  # 10 samples in batches of 4
        ({"steps": None, "epochs": 2.0}, 5),
        ({"steps": None, "epochs": 2.0, "batch_size": 2, "accumulate": 2}, 5),
        ({"steps": None, "epochs": 0.01}, 1),
    ],
)
def test_epochs_are_passes_over_the_samples(
    tmp_path: Path, base: Path, phantoms: Path, changes: dict[str, Any], steps: int
) -> None:
    told = about(train(tmp_path, base, phantoms, changed(samples=10, validation_samples=1, **changes)))
    assert told["steps"] == steps == max(row["step"] for row in told["curves"])
    assert told["samples"]["train"] == 10


def test_a_name_stands_once_in_a_stack(tmp_path: Path, base: Path, phantoms: Path, adapters: Path) -> None:
    with pytest.raises(ValueError, match=r"stage 'say' is in .* already"):
        train(tmp_path, base, phantoms, changed(name="say"), before=adapters)
    assert list(tmp_path.iterdir()) == []


def copy_splits(phantoms: Path, out: Path, splits: set[str]) -> Path:
    data = Dataset.open(phantoms)
    rows = [(s, [data.image_bytes(ref) for ref in s.images]) for split in splits for s in data.samples(split)]
    write_dataset(out, rows)
    return out


def test_no_training_samples_is_an_error(tmp_path: Path, base: Path, phantoms: Path) -> None:
    dataset = copy_splits(phantoms, tmp_path / "dataset", {"validation", "test"})
    with pytest.raises(ValueError, match="dataset: the train split is empty"):
        train(tmp_path / "run", base, dataset)
    assert not (tmp_path / "run").exists()


def test_without_a_validation_split_the_last_step_is_kept(tmp_path: Path, base: Path, phantoms: Path) -> None:
    dataset = copy_splits(phantoms, tmp_path / "dataset", {"train"})
    adapter = train(tmp_path, base, dataset, changed(steps=3))
    told = about(adapter)
    assert (told["best_step"], told["eval_loss"], told["samples"]["validation"]) == (3, None, 0)
    assert told["best_by"].startswith("last step")
    assert [row["step"] for row in told["curves"]] == [2]
    last = tmp_path / "work" / "checkpoint-3" / "adapter_model.safetensors"
    assert sha256_file(last) == sha256_file(adapter / "adapter_model.safetensors")


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


def test_preprocessed_images_are_shared_and_the_oldest_dropped(
    base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset.open(phantoms)
    samples = data.samples("train")
    encoder = Encoder(base, MODEL.min_pixels, MODEL.max_pixels)
    seen: list[int] = []
    see = encoder.see

    def counted(images: Sequence[Image.Image]) -> Seen:
        seen.append(len(images))
        return see(images)

    monkeypatch.setattr(encoder, "see", counted)
    rows = EncodedSamples(data, samples, encoder)
    encoded = [rows[number] for number in range(len(samples))]
    assert len(seen) == len({sample.images for sample in samples})
    monkeypatch.setattr("medforge.train.data._SEEN_BYTES", 1)
    seen.clear()
    tight = EncodedSamples(data, samples[:12], encoder)
    for number in range(12):
        np.testing.assert_array_equal(tight[number].pixel_values, encoded[number].pixel_values)
    assert len(tight._seen) == 1
    assert math.prod(next(iter(tight._seen.values())).pixel_values.shape) * 4 == tight._bytes


def test_json_of_a_stage_is_strict(unbroken: Path) -> None:
    """No NaN and no infinity, which other readers of JSON refuse."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((unbroken / "out" / "01-see" / "stage.json").read_text(), parse_constant=refuse)
    write_json(unbroken / "check.json", about(unbroken / "out" / "01-see"))
