"""What is seen of a stage while it runs: TensorBoard and progress.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medforge.train.board import Board
from tests.unit.train.runs import about, at_step, changed, figures, train


def events(logs: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    found = EventAccumulator(str(logs))
    found.Reload()
    return found


def rows(logs: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = (logs / "progress.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def board(logs: Path, done: int = 0) -> Board:
    return Board(logs, "see", 20, done, lambda: 12345)


def test_figures_are_curves_and_lines(tmp_path: Path) -> None:
    one = board(tmp_path / "logs")
    one.report(5, {"step": 5, "loss": 2.5, "mfu": 0.25})
    one.report(5, {"eval_loss": 3.0, "eval_match_auroc": 0.75})
    one.report(10, {"step": 10, "loss": math.nan, "mfu": 0.5})
    one.close()
    found = rows(tmp_path / "logs")
    assert [(row["step"], row["steps"], row["peak_memory_bytes"]) for row in found] == [
        (n, 20, 12345) for n in (5, 5, 10)
    ]
    assert [row.get("loss", "absent") for row in found] == [2.5, "absent", None]
    assert found[1]["eval_match_auroc"] == 0.75
    shown = events(tmp_path / "logs")
    assert set(shown.Tags()["scalars"]) == {"train/loss", "train/mfu", "eval/loss", "eval/match_auroc"}
    assert [(event.step, event.value) for event in shown.Scalars("train/mfu")] == [(5, 0.25), (10, 0.5)]


def test_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pace since this run began: steps of the run before it do not count."""
    now = [100.0]
    monkeypatch.setattr("medforge.train.board.time.monotonic", lambda: now[0])
    one = board(tmp_path, done=10)
    now[0] += 8.0
    one.report(14, {"loss": 1.0})
    now[0] += 10.0
    one.report(20, {"loss": 1.0})
    one.close()
    assert [row["seconds_left"] for row in rows(tmp_path)] == [12.0, 0.0]
    assert one.progress.done == 20


def test_answers_are_shown_with_their_pictures(tmp_path: Path) -> None:
    one = board(tmp_path)
    wide = Image.new("RGB", (1024, 512), (200, 10, 10))
    one.answers(5, [("Is it | so?", "yes", "no\nit is", [wide]), ("And alone?", "no", "no", [])])
    one.close()
    shown = events(tmp_path)
    [text] = shown.Tensors("answers/text_summary")
    assert text.step == 5
    table = text.tensor_proto.string_val[0].decode()
    assert table.splitlines()[2:] == ["| Is it \\| so? | yes | no it is |", "| And alone? | no | no |"]
    assert shown.Tags()["images"] == ["answers/0"]
    [picture] = shown.Images("answers/0")
    assert (picture.width, picture.height) == (256, 128)
    assert wide.size == (1024, 512)


def test_a_stage_shows_itself(tmp_path: Path, base: Path, phantoms: Path) -> None:
    adapter = train(tmp_path, base, phantoms, changed(heads={}, steps=4))
    shown = events(tmp_path / "logs")
    wanted = figures(adapter, "eval_loss")
    assert {event.step: event.value for event in shown.Scalars("eval/loss")} == pytest.approx(wanted)
    assert [event.step for event in shown.Scalars("train/loss")] == [2, 4]
    tags = set(shown.Tags()["scalars"])
    rates = {"mfu", "samples_per_second", "text_tokens_per_second", "image_tokens_per_second"}
    assert {f"train/{name}" for name in rates} <= tags
    assert {"eval/region_iou", "eval/match_auroc", "eval/accuracy", "train/learning_rate"} <= tags
    assert len(shown.Tensors("answers/text_summary")) == 2
    assert shown.Tags()["images"] == ["answers/0", "answers/1"]
    for row in rows(tmp_path / "logs"):
        assert row["peak_memory_bytes"] > 1 << 20
        assert row.get("mfu", 1) > 0 and row.get("samples_per_second", 1) > 0
    assert [row["step"] for row in rows(tmp_path / "logs")] == [2, 2, 4, 4]


def test_a_resumed_run_takes_the_place_of_what_was_lost(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps after the checkpoint were shown once already; TensorBoard keeps those of the run that goes on."""

    def end(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    stage = changed(evaluate_every=1, checkpoint_every=4, learning_rate=50.0, schedule="constant", generate_samples=0)
    with monkeypatch.context() as patch:
        at_step(patch, end)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, base, phantoms, stage)
    adapter = train(tmp_path, base, phantoms, stage)
    shown = events(tmp_path / "logs")
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert {event.step: event.value for event in shown.Scalars("eval/loss")} == pytest.approx(
        figures(adapter, "eval_loss")
    )


def test_a_stage_that_ends_early_says_so(tmp_path: Path, base: Path, phantoms: Path) -> None:
    stage = changed(learning_rate=50.0, schedule="constant", warmup=0.0, steps=20, patience=1, generate_samples=0)
    end = about(train(tmp_path, base, phantoms, stage))["steps"]
    assert rows(tmp_path / "logs")[-1]["stopped_early"] == end < 20
