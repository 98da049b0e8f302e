"""The benchmark's model has the ids, the files and the vocabulary that every framework expects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.train.model import QWEN, Shape, build, build_tokenizer
from medforge.models.encode import Encoder
from medforge.models.load import load_model
from medforge.models.tiny import SPECIAL_TOKENS
from medforge.records import ImageRef, Sample, Turn

TEXTS = ["Is there a fracture of the left rib?", "No", "pneumothorax", "system\nuser\nassistant\n"] * 20
TINY = replace(Shape(), hidden=64, intermediate=96, layers=2, heads=2, key_value_heads=1, tower_width=32,
               tower_layers=1, tower_heads=2)  # fmt: skip
# https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct, tokenizer_config.json and config.json
QWENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the benchmark's kind in small."""
    out = tmp_path_factory.mktemp("benchmark") / "model"
    build(out, TEXTS, TINY, 448 * 448, seed=0)
    return out


def test_with_qwens_vocabulary_the_ids_are_qwens() -> None:
    tokenizer = build_tokenizer(TEXTS, QWEN)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in QWENS} == QWENS
    assert {token: QWEN.special_ids()[token] for token in QWENS} == QWENS


def test_the_configuration_names_the_tokenizers_ids(folder: Path) -> None:
    tokenizer = Encoder(folder, 56 * 56, 448 * 448).tokenizer
    config = json.loads((folder / "config.json").read_text())
    for name, token in (("image_token_id", "<|image_pad|>"), ("vision_start_token_id", "<|vision_start|>"),
                        ("video_token_id", "<|video_pad|>"), ("vision_end_token_id", "<|vision_end|>")):  # fmt: skip
        assert config[name] == tokenizer.convert_tokens_to_ids(token)
    assert config["text_config"]["vocab_size"] >= len(tokenizer)


def test_no_text_reaches_an_unused_entry(folder: Path) -> None:
    """Filler entries have a plain space, which no byte-level token has; their names in a text become other tokens."""
    tokenizer = Encoder(folder, 56 * 56, 448 * 448).tokenizer
    filler = {number for name, number in tokenizer.get_vocab().items() if name.startswith("unused ")}
    assert len(filler) > 6000
    for text in ("unused 5000", " unused 5000 ", "Is there a fracture?", "ünïcödé 肺"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert not filler & set(ids)
        assert tokenizer.decode(ids) == text


def test_a_sample_goes_through_the_model(folder: Path) -> None:
    """Special tokens are one id each, the image has its tokens, and the model gives logits over its vocabulary."""
    encoder = Encoder(folder, 56 * 56, 448 * 448)
    ref = ImageRef("0" * 64, 640, 480)
    turns = (Turn("user", "<image>\nIs there a fracture?"), Turn("assistant", "No"))
    sample = Sample("s", (ref,), turns, "closed", "presence", "en", "study", "unit", "CC0-1.0", "train")
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    item = encoder.encode(sample, [Image.fromarray(pixels)])
    assert item.input_ids[0] == TINY.special_ids()["<|im_start|>"]
    # smart_resize of Qwen2-VL: both sides by sqrt(640 * 480 / 448 ** 2) = 1.237, down to whole steps of 28 pixels:
    # 517 and 388 become 18 and 13 steps, each of them a token
    assert (item.input_ids == TINY.special_ids()["<|image_pad|>"]).sum() == 18 * 13
    import torch

    from medforge.models.encode import collate

    batch = collate([item], encoder.image_id, encoder.pad_id)
    with torch.inference_mode():
        outputs = load_model(folder, "float32")(**batch)
    assert outputs.logits.shape == (1, item.length, TINY.vocabulary)
    assert torch.isfinite(outputs.loss)


def test_the_processors_limits_are_the_works(folder: Path) -> None:
    values = json.loads((folder / "preprocessor_config.json").read_text())
    assert values["size"] == {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    assert (values["min_pixels"], values["max_pixels"]) == (56 * 56, 448 * 448)
    assert (values["patch_size"], values["merge_size"], values["temporal_patch_size"]) == (14, 2, 2)


def test_the_transformer_dominates() -> None:
    """The output layer has no larger a share of the language model than in Qwen2-VL-2B (0.23 of 1.54 billion)."""
    shape = Shape()
    head = shape.hidden // shape.heads
    attention = 2 * shape.hidden**2 + 2 * shape.hidden * head * shape.key_value_heads
    layers = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    output = shape.vocabulary * shape.hidden
    assert output / (output + layers) < 0.15
    assert shape.first_special + len(SPECIAL_TOKENS) <= shape.vocabulary


def test_the_seed_decides_the_weights(folder: Path, tmp_path: Path) -> None:
    about = build(tmp_path / "again", TEXTS, TINY, 448 * 448, seed=0)
    build(tmp_path / "other", TEXTS, TINY, 448 * 448, seed=1)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "again", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]
    assert about["vocabulary"] == 8192 * 64
