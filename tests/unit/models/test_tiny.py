"""The tiny model: real files that transformers loads, made again byte for byte, and able to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medforge.config import TinyConfig
from medforge.files import list_files, sha256_file, tree_digest
from medforge.models.families import FAMILIES
from medforge.models.tiny import SPECIAL_TOKENS, build

QUICK = TinyConfig(steps=1, batch_size=2)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_transformers_opens_it_as_the_familys_own_model(tiny_models: dict[str, Path], family: str) -> None:
    import transformers

    folder, kind = str(tiny_models[family]), FAMILIES[family]
    assert transformers.AutoConfig.from_pretrained(folder).model_type == kind.model_type
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == kind.model_class
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters < 5_000_000
    assert json.loads((tiny_models[family] / "tiny.json").read_text())["parameters"] == parameters
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert images.patch_size == kind.patch_size == model.config.vision_config.patch_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.text_config.vocab_size <= 700
    for token, number in (
        ("<|image_pad|>", model.config.image_token_id),
        ("<|video_pad|>", model.config.video_token_id),
        ("<|im_end|>", model.generation_config.eos_token_id),
        ("<|endoftext|>", model.generation_config.pad_token_id),
    ):
        assert tokenizer.convert_tokens_to_ids(token) == number


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(base))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_is_one_token(tokenizer: Any, token: str) -> None:
    assert len(tokenizer.encode(token)) == 1
    assert tokenizer.decode(tokenizer.encode(f"a{token}1")) == f"a{token}1"


def test_digits_stay_apart_as_in_qwen(tokenizer: Any) -> None:
    assert len(tokenizer.encode("1000")) == 4


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, family: str) -> None:
    for name in ("one", "again"):
        build(tmp_path / name, family, QUICK)
    build(tmp_path / "other", family, QUICK.model_copy(update={"seed": 1}))
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "again")
    assert list_files(tmp_path / "one") == list_files(tmp_path / "other")
    weights = [sha256_file(tmp_path / name / "model.safetensors") for name in ("one", "other")]
    assert weights[0] != weights[1]


def test_other_users_may_read_it(base: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in base.iterdir()} == {0o644}


def test_building_leaves_torchs_settings_alone(tmp_path: Path) -> None:
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    build(tmp_path / "model", "qwen3-vl", TinyConfig(steps=0))
    after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert after == before


def test_pretraining_lowers_the_loss(tmp_path: Path, base: Path) -> None:
    """An untrained model guesses: ln(vocabulary) or worse. A few steps have to bring it well below that."""
    assert json.loads((base / "tiny.json").read_text())["loss"] is None
    about = build(tmp_path / "model", "qwen3-vl", TinyConfig(steps=24, batch_size=4))
    assert about["loss"] < 0.8 * np.log(json.loads((base / "config.json").read_text())["text_config"]["vocab_size"])


def test_nothing_is_left_when_the_family_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        build(tmp_path / "model", "qwen1-vl", QUICK)
    assert list(tmp_path.iterdir()) == []
