"""Capacity: counts against what is published of the models, arithmetic by hand, and the document's own examples."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from medforge.cli import main
from medforge.commands.capacity import Shape, Work, estimate, shape

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "capacity.md"
LANGUAGE = ("language_attention", "language_mlp")


@pytest.mark.parametrize(
    ("model", "billions", "trained", "cache_kib"),
    [
        # parameters as the Hugging Face hub tells them of the safetensors; trained with rank 16 on all linear layers
        # of a Qwen2(.5) 1.5B and 7B as peft prints it; keys and values: 4 bytes x layers x heads x 128, by hand
        ("qwen2-vl-2b", 2.21, 18_464_768, 28),
        ("qwen2-vl-7b", 8.29, 40_370_176, 56),
        ("qwen2-vl-72b", 73.4, None, 320),
    ],
)
def test_the_published_models_are_counted_as_published(
    model: str, billions: float, trained: int | None, cache_kib: float
) -> None:
    found = shape(model, LANGUAGE, 16)
    assert found.total / 1e9 == pytest.approx(billions, rel=2e-3)
    assert trained in (None, found.trained)
    assert 4 * found.layers * found.kept_width == cache_kib * 1024


# 2 layers of width 10, 100 parameters in the language part; an image of 8 x 8 pixels: 16 patches of 2 x 2, 4 tokens
SMALL = Shape(
    total=200, language=100, tower=50, head=30, trained=8, layers=2, width=10, kept_width=5, vocabulary=3, patch=2,
    merge=2, tuned_tower=False,
)  # fmt: skip
WORK = Work(
    samples=6, questions=3, pixels=64, image_bytes=1 << 30, question_tokens=2, answer_tokens=1, epochs=2.0,
    micro_tokens=26, devices=2, zero3=False, peak=1e3, mfu=0.5, releases=3, context=4, concurrency=2,
)  # fmt: skip


def figures(model: Shape, work: Work) -> dict[str, float]:
    return {line.what: line.value for line in estimate(model, work)}


def test_the_arithmetic_is_that_of_a_hand() -> None:
    found = figures(SMALL, WORK)
    # a row: 4 tokens of the image, 3 x 3 of text. Pairs: 10 in the image, 3 x (6 + 12) in the branches
    row = 4 * 100 * 13 + 12 * 2 * 10 * (10 + 54) + 4 * 30 * 3
    total = 2 * (2 * row + 2 * 50 * 16)  # 2 images, 2 epochs; the frozen tower once
    assert found["tokens of an epoch"] == 26
    assert found["arithmetic"] == pytest.approx(total / 1e15)
    assert found["GPU hours"] == pytest.approx(total / 500 / 3600) == 2 * found["hours on all devices"]
    gib = 1 << 30
    assert found["weights, a device"] * gib == 400
    assert found["adapter, a device"] * gib == 128
    assert found["activations, a device"] * gib == 26 * 10 * 38
    assert found["logits, a device"] * gib == pytest.approx(10 * 26 * 3 * 3 / 13)
    assert found["image features"] * gib == 2 * 2 * 4 * 10
    assert found["object store"] == pytest.approx(2 + 4 * 400 / gib)
    assert found["key-value cache"] * gib == 4 * 2 * 5 * 4 * 2


def test_what_changes_what() -> None:
    base = figures(SMALL, WORK)
    dealt = figures(SMALL, Work(**{**vars(WORK), "zero3": True}))
    assert dealt["weights, a device"] == base["weights, a device"] / 2
    assert dealt["GPU hours"] == base["GPU hours"]
    alone = figures(SMALL, Work(**{**vars(WORK), "questions": 1}))
    assert alone["tokens of an epoch"] == 6 * (4 + 3) > base["tokens of an epoch"]
    assert alone["data set"] == 3 * base["data set"]
    tuned = figures(Shape(**{**vars(SMALL), "tuned_tower": True}), WORK)
    assert tuned["image features"] == 0 and tuned["arithmetic"] > base["arithmetic"]


def test_a_folder_with_a_config_is_enough(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLConfig

    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
    Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2,
                     "intermediate_size": 48, "out_hidden_size": 64}).save_pretrained(tmp_path)  # fmt: skip
    found = shape(str(tmp_path), ["language_attention"], 2)
    assert (found.layers, found.width, found.kept_width, found.patch) == (2, 64, 32, 14)
    assert found.trained == 2 * 2 * ((64 + 64) * 2 + (64 + 32) * 2)  # q and o, k and v


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gpt-2"], "MODEL: 'gpt-2' is no folder"),
        (["qwen2-vl-2b", "--tune", "everything"], "--tune: everything is none of"),
        (["qwen2-vl-2b", "--tune", "re:nothing"], "no linear layer"),
        (["qwen2-vl-2b", "--zero3"], "--zero3 has no effect on one device"),
    ],
)
def test_what_is_wrong_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", *words]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--samples", "0"], ["--samples", "x"], ["--mfu", "1.5"], ["--epochs", "nan"]])
def test_numbers_that_are_none_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["capacity", "qwen2-vl-2b", *words])
    assert words[0] in capsys.readouterr().err


def test_the_documents_examples_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"(?m)^    \$ medforge (.+)\n((?:    .+\n)+)", DOCUMENT.read_text())
    assert len(blocks) == 3
    for command, text in blocks:
        assert main(shlex.split(command)) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line.strip() for line in text.splitlines()] == [line.strip() for line in printed[:-1]], command
