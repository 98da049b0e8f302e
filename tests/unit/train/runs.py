"""Short stages that several tests run, and what is asked of their results."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from medforge.config import CheckpointConfig, LoraConfig, ModelConfig, ParallelConfig, StageConfig
from medforge.dataset import Dataset
from medforge.dataset_writer import write_dataset
from medforge.files import list_files, read_json, sha256_file
from medforge.models.load import stack
from medforge.records import Sample
from medforge.train import loop
from medforge.train.stage import Inputs, run

MODEL = ModelConfig()
SEED = 3
STAGE = StageConfig(
    name="see",
    tune=["vision_merger", "language_mlp"],
    lora=LoraConfig(r=4, alpha=8, dropout=0.1),  # dropout draws random numbers, which a resumed run has to draw again
    steps=6,
    batch_size=4,
    samples=40,
    learning_rate=4e-3,
    evaluate_every=2,
    validation_samples=6,
    generate_samples=2,
    max_new_tokens=4,
)
# another process runs the stage in a folder: base, data set, folder, settings; a line of `before` goes first
CHILD = """
import sys
from pathlib import Path
from medforge.config import ModelConfig, StageConfig
from medforge.train import loop, stage
base, data, folder = map(Path, sys.argv[1:4])
BEFORE
settings = StageConfig.model_validate_json(sys.argv[4])
given = stage.Inputs(base, data, None)
stage.run(given, folder / 'out', folder / 'work', folder / 'logs', settings, ModelConfig(), 3)
"""


def changed(stage: StageConfig = STAGE, **changes: Any) -> StageConfig:
    """The stage with other settings."""
    return StageConfig.model_validate(stage.model_dump() | changes)


# no random numbers, so that another way to compute the same gives the same
PLAIN = changed(lora={"r": 4, "alpha": 8}, steps=4, batch_size=8, evaluate_every=2, learning_rate=2e-3)
QUIET = changed(PLAIN, evaluate_every=4, generate_samples=0)


def train(
    folder: Path,
    base: Path,
    dataset: Path,
    stage: StageConfig = STAGE,
    before: Path | None = None,
    model: ModelConfig = MODEL,
    seed: int = SEED,
    parallel: ParallelConfig | None = None,
    checkpoints: CheckpointConfig | None = None,
    draw: bool = False,
) -> Path:
    """Train in `folder`; the adapter's folder is returned. Curves are drawn only with `draw`: that takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medforge.train.throughput.device_peak", lambda *_: 1e12)
        if not draw:
            patch.setattr("medforge.train.stage.plot_curves", lambda *_: None)
        inputs = Inputs(base, dataset, before)
        run(
            inputs, folder / "out", folder / "work", folder / "logs", stage, model, seed, parallel, checkpoints
        )  # fmt: skip
    return stack(folder / "out")[-1]


def child(folder: Path, base: Path, dataset: Path, stage: StageConfig, before: str = "") -> subprocess.Popen[str]:
    """The same in another process, whose output can be read. `before` is Python that runs first."""
    given = [str(base), str(dataset), str(folder), stage.model_dump_json()]
    command = [sys.executable, "-c", CHILD.replace("BEFORE", before), *given]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def at_step(patch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[int]:
    """Call `act` with the number of each step, counted from 1, when it was taken. Returns the list of them."""
    taken: list[int] = []
    one_step = loop.one_step

    def counted(parts: Any, works: Any, seed: int, step: int, rates: list[float]) -> tuple[float, float]:
        found = one_step(parts, works, seed, step, rates)
        taken.append(step + 1)
        act(step + 1)
        return found

    patch.setattr(loop, "one_step", counted)
    return taken


Act = Callable[[Any, Any, int, tuple[float, float]], tuple[float, float]]


def replaced(patch: pytest.MonkeyPatch, act: Act) -> None:
    """Let `act` see the parts, the micro-batches and the number of each step, and say what its loss and norm are."""
    one_step = loop.one_step

    def new(parts: Any, works: Any, seed: int, step: int, rates: list[float]) -> tuple[float, float]:
        return act(parts, works, step + 1, one_step(parts, works, seed, step, rates))

    patch.setattr(loop, "one_step", new)


def about(adapter: Path) -> dict[str, Any]:
    """What the adapter's stage.json tells."""
    return dict(read_json(adapter / "stage.json"))


def figures(adapter: Path, name: str) -> dict[int, float]:
    """A figure of the curves by step."""
    return {int(row["step"]): row[name] for row in about(adapter)["curves"] if name in row}


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file."""
    return {name: sha256_file(folder / name) for name in list_files(folder)}


def same_files(one: Path, other: Path) -> None:
    """Assert that the folders hold the same."""
    if (one / "stage.json").is_file():
        assert about(one) == about(other)  # first, as it says more
    assert digests(one) == digests(other)


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints that a run in `folder` has left."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "work" / "checkpoints").glob("step-*"))


def checkpoint(folder: Path, step: int) -> Path:
    """The folder of one of them."""
    return folder / "work" / "checkpoints" / f"step-{step:08d}"


def copy_work(source: Path, target: Path) -> None:
    """Take a run's checkpoints to another folder."""
    shutil.copytree(source / "work", target / "work")


def copy_samples(phantoms: Path, out: Path, kept: Callable[[Sample], bool]) -> Path:
    """A data set of some of the samples."""
    data = Dataset.open(phantoms)
    everything = [sample for split in ("train", "validation", "test") for sample in data.samples(split)]
    write_dataset(out, [(s, [data.image_bytes(ref) for ref in s.images]) for s in everything if kept(s)])
    return out


def weights_are_those_of(adapter: Path, folder: Path) -> None:
    """Assert that the adapter holds a checkpoint's weights, which go by other names there."""
    import torch
    from safetensors.torch import load_file

    kept = load_file(folder / "weights.safetensors")
    found = load_file(adapter / "adapter_model.safetensors")
    plain = {name.removeprefix("model.").replace(".default.", "."): tensor for name, tensor in kept.items()}
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in found.items())


def close(one: Mapping[int, float], other: Mapping[int, float], tolerance: float) -> None:
    """Assert that two curves are the same within a relative tolerance."""
    assert one.keys() == other.keys() and one
    assert list(one.values()) == pytest.approx([other[step] for step in one], rel=tolerance)
