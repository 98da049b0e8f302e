"""The judge's loss is the model's own, and an adapter that does not fit is found out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.train.loss import losses
from benchmarks.train.work import Work
from medforge.config import DataConfig, PhantomConfig
from medforge.convert import run as convert
from medforge.dataset import Dataset
from medforge.models.encode import Encoder, collate
from medforge.models.load import load_model

WORK = Work(short=1, long=2, scored=10, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set where the judge looks for it."""
    folder = tmp_path_factory.mktemp("data")
    convert("phantom", folder / "medforge", DataConfig(source="phantom", phantom=PhantomConfig(images=12, size=56)))
    return folder


def save_adapter(model: Path, out: Path, scale: float) -> Path:
    """A LoRA of random weights times `scale`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    network = get_peft_model(load_model(model, "float32"), config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight *= scale
    network.save_pretrained(str(out))
    return out


def test_the_loss_is_the_mean_over_answer_tokens(tiny_models: dict[str, Path], data: Path) -> None:
    """Against the models' own loss, one sample at a time, weighted by its answer tokens."""
    model = tiny_models["qwen2-vl"]
    dataset = Dataset.open(data / "medforge")
    encoder = Encoder(model, WORK.min_pixels, WORK.max_pixels)
    network = load_model(model, "float32")
    found, counts = [], []
    for sample in dataset.samples("train")[: WORK.scored]:
        item = encoder.encode(sample, dataset.images(sample))
        with torch.inference_mode():
            found.append(float(network(**collate([item], encoder.image_id, encoder.pad_id)).loss))
        counts.append(item.answer_tokens)
    assert losses(model, data, [None], WORK) == [pytest.approx(np.average(found, weights=counts), rel=1e-5)]


def test_an_adapter_counts_and_an_idle_one_does_not(tiny_models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    model = tiny_models["qwen2-vl"]
    idle = save_adapter(model, tmp_path / "idle", 0.0)
    strong = save_adapter(model, tmp_path / "strong", 20.0)
    base, same, other = losses(model, data, [None, idle, strong], WORK)
    assert same == pytest.approx(base, rel=1e-6)
    assert isinstance(other, float)
    assert other != pytest.approx(base, rel=1e-3)


def test_an_adapter_of_other_names_is_an_error_and_no_loss(
    tiny_models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """peft would load it with a warning and leave the model as it was."""
    from safetensors.torch import load_file, save_file

    model = tiny_models["qwen2-vl"]
    strange = save_adapter(model, tmp_path / "strange", 1.0)
    weights = load_file(strange / "adapter_model.safetensors")
    renamed = {name.replace("layers.0.", "layers.9."): weight for name, weight in weights.items()}
    save_file(renamed, strange / "adapter_model.safetensors")
    (found,) = losses(model, data, [strange], WORK)
    assert isinstance(found, str)
    assert "do not fit the model" in found
