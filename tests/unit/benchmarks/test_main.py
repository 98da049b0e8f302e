"""The command from its options to the table, the JSON file and the last line; training itself is stood in for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.train import __main__ as command
from benchmarks.train.measure import Contender, Place
from benchmarks.train.report import Result
from benchmarks.train.work import Dtype, Work

LONGER = {"medforge": 2.0, "llamafactory": 8.0, "ms-swift": 16.0}


def contender(name: str) -> Contender:
    return Contender(name, "default", lambda run: [], lambda run: run.out, lambda run: 1.0)


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every framework trains in a known time; llamafactory's adapter is found not to fit."""

    def measure(one: Contender, place: Place, work: Work, dtype: Dtype, repeats: int) -> tuple[Result, Path | None]:
        seconds = {"short": [5.0], "long": [5.0 + LONGER[one.framework]]}
        return Result(one.framework, one.setting, dtype, seconds, [1 << 30], None, 2.0), Path(one.framework)

    def alone(function: Any, model: Path, data: Path, adapters: list[Path | None], work: Work) -> list[float | str]:
        return [2.5 if path is None else "does not fit" if path.name == "llamafactory" else 2.25 for path in adapters]

    monkeypatch.setattr(command.measure, "measure", measure)
    monkeypatch.setattr(command, "alone", alone)
    place = Place(Path("model"), {n: Path(str(n)) for n in (8, 16, Work.short, Work.long)}, Path("runs"))
    monkeypatch.setattr(command, "prepare", lambda *_: (place, {"model": {"parameters": 1}}))
    entered = [contender(name) for name in LONGER]
    monkeypatch.setattr(command, "enter", lambda *_: (entered, {"medforge": {"torch": "2.13.0"}}, []))


@pytest.mark.usefixtures("stood_in")
def test_the_command_ends_with_the_ratio_and_writes_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    given = ["--quick", "--dtype", "float32", "--cache", str(tmp_path), "--out", str(out)]
    assert command.main(given) == 1  # one of the peers has an error
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "train: ratio 8.00 over ms-swift"
    assert "error: llamafactory default float32: does not fit" in lines
    saved = json.loads(out.read_text())
    assert saved["headline"] == lines[-1]
    assert saved["command"] == f"python -m benchmarks.train --quick --dtype float32 --cache {tmp_path} --out {out}"
    assert saved["loss_before_training"] == 2.5
    assert [row["loss"] for row in saved["results"]] == [2.25, None, 2.25]
    assert saved["machine"]["threads"] == Work().threads
    assert saved["versions"] == {"medforge": {"torch": "2.13.0"}}


@pytest.mark.usefixtures("stood_in")
@pytest.mark.parametrize("partial", [["--quick"], ["--only", "medforge"], ["--dtype", "bfloat16"]])
def test_a_partial_run_does_not_replace_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial: list[str]
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results" / "train.json")
    command.main([*partial, "--cache", str(tmp_path)])
    assert not (tmp_path / "results").exists()
    assert (tmp_path / "train" / "partial.json").is_file()


@pytest.mark.usefixtures("stood_in")
def test_a_whole_run_writes_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results" / "train.json")
    command.main(["--cache", str(tmp_path)])
    assert {row["dtype"] for row in json.loads((tmp_path / "results" / "train.json").read_text())["results"]} == {
        "float32",
        "bfloat16",
    }
