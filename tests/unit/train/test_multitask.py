"""The multi-task stage learns to find and to judge, and its heads go with the adapter."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medforge.dataset_writer import write_dataset
from medforge.files import list_files, sha256_bytes, sha256_file
from medforge.models.heads import load_heads, load_task_model
from medforge.models.load import stack
from medforge.records import Box, ImageRef, Sample, Turn, sample_id
from tests.unit.train.runs import about, changed, figures, train

COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}
SIDE, CELL = 64, 32  # four image tokens
LEARN = changed(
    name="learn",
    tune=["vision_merger", "vision_tower", "language_attention", "language_mlp"],
    method="full",
    heads={"learning_rate": 1e-3},
    samples=None,
    steps=180,
    batch_size=16,
    learning_rate=1e-3,
    warmup=0.1,
    evaluate_every=90,
    validation_samples=100,
    generate_samples=48,
)
SHORT = changed(heads={}, steps=2)


def squares(out: Path, counts: dict[str, int]) -> Path:
    """Drawings simpler than the phantoms, which a model without pre-training can learn: a coloured square on noise."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in counts.items():
        for number in range(count):
            pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
            colour = list(COLOURS)[rng.integers(3)]
            row, column = rng.integers(2, size=2)
            half = int(rng.integers(10, 16))
            y, x = row * CELL + CELL // 2, column * CELL + CELL // 2
            pixels[y - half : y + half, x - half : x + half] = COLOURS[colour]
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            image = ImageRef(sha256_bytes(stream.getvalue()), SIDE, SIDE)
            box = Box("square", ((x - half) / SIDE, (y - half) / SIDE, (x + half) / SIDE, (y + half) / SIDE))
            place = f"{('upper', 'lower')[row]} {('left', 'right')[column]}"
            for kind, question, answer in (
                ("color", "What colour is the square?", colour),
                ("position", "Where is the square?", place),
            ):
                turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
                sample = Sample(
                    id=sample_id("squares", (image,), turns),
                    images=(image,),
                    turns=turns,
                    answer_type="open",
                    question_type=kind,
                    language="en",
                    study_id=f"{split}-{number}",
                    source="unit",
                    licence="CC0-1.0",
                    split=split,
                    boxes=(box,),
                )
                rows.append((sample, [stream.getvalue()]))
    write_dataset(out, rows)
    return out


@pytest.mark.slow
def test_the_heads_learn(tmp_path: Path, base: Path) -> None:
    """On images that were not trained on, from a base and heads that know nothing."""
    dataset = squares(tmp_path / "squares", {"train": 200, "validation": 24, "test": 1})
    still = train(tmp_path / "still", base, dataset, changed(LEARN, steps=1, learning_rate=1e-12, warmup=0.0))
    untrained = about(still)["validation"]
    assert 0.3 < untrained["match_auroc"] < 0.7
    assert untrained["region_iou"] < 0.3
    adapter = train(tmp_path / "learned", base, dataset, LEARN)
    learned = about(adapter)["validation"]
    assert learned["match_auroc"] > 0.85
    assert learned["region_iou"] > 0.45
    assert learned["accuracy"] > 0.85 > untrained["accuracy"]
    assert figures(adapter, "eval_region_iou")[180] > figures(adapter, "eval_region_iou")[90]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Path:
    """The adapter of two steps."""
    return train(tmp_path_factory.mktemp("short"), base, phantoms, SHORT)


def test_heads_go_with_the_adapter(short: Path, base: Path) -> None:
    import torch

    assert stack(short.parent) == [short]
    files = [Path(name) for name in list_files(short)]
    assert {path.name for path in files} >= {"heads.safetensors", "heads.json"}
    assert {(short / path).stat().st_mode & 0o777 for path in files} == {0o644}
    task = load_task_model(base, "float32", [short])
    heads = load_heads(short)
    assert heads is not None
    for name, tensor in task.heads.state_dict().items():
        assert torch.equal(tensor.cpu(), heads.state_dict()[name])
    state = torch.randn(2, task.heads.hidden, device=task.model.device)
    assert task.heads.region(state).shape == (2, 4)
    assert task.heads.match(state).shape == (2,)


def test_what_is_saved_was_trained(short: Path, tmp_path: Path, base: Path, phantoms: Path) -> None:
    """Every part of the heads has moved from where the seed put it, the weights of the losses too."""
    import torch

    still = load_heads(train(tmp_path, base, phantoms, changed(SHORT, steps=1, warmup=0.0, **slowly())))
    moved = load_heads(short)
    assert still is not None and moved is not None
    for name, tensor in moved.state_dict().items():
        assert not torch.equal(tensor, still.state_dict()[name]), name
    fixed = load_heads(train(tmp_path / "fixed", base, phantoms, changed(SHORT, heads={"weighting": "fixed"})))
    assert fixed is not None
    assert all(not bool(tensor.any()) for name, tensor in fixed.state_dict().items() if "log_variance" in name)


def slowly() -> dict[str, Any]:
    return {"learning_rate": 1e-12, "heads": {"learning_rate": 1e-12}}


def test_a_later_stage_goes_on_with_the_heads(short: Path, tmp_path: Path, base: Path, phantoms: Path) -> None:
    stage = changed(SHORT, name="next", steps=1, warmup=0.0, **slowly())
    following = train(tmp_path / "one", base, phantoms, stage, before=short.parent)
    before, after = load_heads(short), load_heads(following)
    assert before is not None and after is not None
    for name, tensor in after.state_dict().items():
        np.testing.assert_allclose(tensor, before.state_dict()[name], atol=1e-9)
    assert about(following)["validation"]["region_iou"] == pytest.approx(about(short)["validation"]["region_iou"])
    with pytest.raises(ValueError, match=r"stage 'next': heads: .*01-see has \(region, match\) = \(True, True\)"):
        train(tmp_path / "two", base, phantoms, changed(stage, heads={"match": False}), before=short.parent)


@pytest.mark.parametrize("heads", [{"match": False}, {"region": False}], ids=["region", "match"])
def test_one_head_alone(tmp_path: Path, base: Path, phantoms: Path, heads: dict[str, bool]) -> None:
    adapter = train(tmp_path, base, phantoms, changed(SHORT, heads=heads))
    found = load_heads(adapter)
    assert found is not None
    assert ((found.region_head is None), (found.match_head is None)) == (
        not heads.get("region", True),
        "match" in heads,
    )


def test_two_runs_have_the_same_heads(short: Path, tmp_path: Path, base: Path, phantoms: Path) -> None:
    again = train(tmp_path, base, phantoms, SHORT)
    assert {name: sha256_file(again / name) for name in list_files(again)} == {
        name: sha256_file(short / name) for name in list_files(short)
    }
