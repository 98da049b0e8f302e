"""Steps are reused when nothing has changed, done again when something has, and resumed where they were killed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from medforge.files import read_json, tree_digest
from medforge.workspace import Step, code_digest, run_step


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDFORGE_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("MEDFORGE_RUN", str(tmp_path / "run"))
    monkeypatch.delenv("MEDFORGE_RUN_PID", raising=False)
    return tmp_path / "workspace"


class Counted:
    """A body that writes its input in capitals, and counts how often it is called."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.calls = 0

    def __call__(self, out: dict[str, Path], scratch: Path) -> Mapping[str, Any]:
        self.calls += 1
        out["folder"].mkdir(exist_ok=True)
        (out["folder"] / "text").write_text(self.source.read_text().upper())
        return {"length": len(self.source.read_text())}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Step]:
    (tmp_path / "in").write_text("abc")

    def step(settings: Any = None, number: int = 0, package: str = "merge") -> Step:
        inputs = {"text": tmp_path / "in"}
        return Step(package, "task", inputs, settings, {"folder": tmp_path / f"out-{number}"})

    return step


def test_an_unchanged_step_is_reused(workspace: Path, tmp_path: Path, make: Callable[..., Step]) -> None:
    body = Counted(tmp_path / "in")
    first = run_step(make(), body)
    assert read_json(tmp_path / "run" / "steps" / "task.json")["reused"] is False
    assert run_step(make(number=1), body) == first == {"length": 3}
    assert body.calls == 1
    assert read_json(tmp_path / "run" / "steps" / "task.json")["reused"] is True
    assert (tmp_path / "out-1" / "text").read_text() == "ABC"
    assert tree_digest(tmp_path / "out-0") == tree_digest(tmp_path / "out-1")


@pytest.mark.parametrize("change", ["input", "settings", "code"])
def test_a_change_makes_it_run_again(
    workspace: Path, tmp_path: Path, make: Callable[..., Step], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    body = Counted(tmp_path / "in")
    run_step(make(settings=1), body)
    if change == "input":
        (tmp_path / "in").write_text("abcd")
    if change == "code":
        monkeypatch.setattr("medforge.workspace.code_digest", lambda package: "another")
    run_step(make(settings=2 if change == "settings" else 1), body)
    assert body.calls == 2


def test_a_killed_step_finds_its_scratch_and_its_output(
    workspace: Path, tmp_path: Path, make: Callable[..., Step]
) -> None:
    def killed(out: dict[str, Path], scratch: Path) -> None:
        (scratch / "checkpoint").write_text("7")
        out["folder"].mkdir()
        (out["folder"] / "rows").write_text("1\n")
        (out["folder"].parent / ".folder.x.tmp").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_step(make(), killed)
    assert not (tmp_path / "out-0").exists()
    assert read_json(tmp_path / "run" / "steps" / "task.error")["error"] == "KeyboardInterrupt"

    def resumed(out: dict[str, Path], scratch: Path) -> None:
        assert (scratch / "checkpoint").read_text() == "7"
        assert [path.name for path in out["folder"].parent.iterdir()] == ["folder"]
        with (out["folder"] / "rows").open("a") as stream:
            stream.write("2\n")

    run_step(make(), resumed)
    assert (tmp_path / "out-0" / "rows").read_text() == "1\n2\n"
    assert not list(workspace.rglob("scratch"))


def test_a_changed_output_in_the_workspace_is_not_handed_out(
    workspace: Path, tmp_path: Path, make: Callable[..., Step], capsys: pytest.CaptureFixture[str]
) -> None:
    body = Counted(tmp_path / "in")
    run_step(make(), body)
    (kept,) = workspace.glob("merge/*/out/folder/text")
    kept.unlink()
    kept.write_text("EVIL")
    run_step(make(number=1), body)
    assert body.calls == 2
    assert (tmp_path / "out-1" / "text").read_text() == "ABC"
    assert "was changed" in capsys.readouterr().out


def test_without_a_workspace_it_writes_straight_to_its_outputs(
    tmp_path: Path, make: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MEDFORGE_WORKSPACE", "MEDFORGE_RUN", "MEDFORGE_RUN_PID"):
        monkeypatch.delenv(name, raising=False)
    body = Counted(tmp_path / "in")
    run_step(make(), body)
    run_step(make(), body)
    assert body.calls == 2
    assert (tmp_path / "out-0" / "text").read_text() == "ABC"


def test_logs_have_no_digest(workspace: Path, tmp_path: Path) -> None:
    outputs = {"result": tmp_path / "result", "logs": tmp_path / "logs"}
    step = Step("train", "task", {}, None, outputs, logs=frozenset({"logs"}))

    def body(out: dict[str, Path], scratch: Path) -> None:
        out["result"].write_text("same")
        out["logs"].write_text("differs")

    run_step(step, body)
    assert set(read_json(tmp_path / "run" / "steps" / "task.json")["outputs"]) == {"result"}
    assert (tmp_path / "logs").read_text() == "differs"


def test_the_code_of_a_step_is_what_it_can_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "medforge"
    names = ("files.py", "cli.py", "models/load.py", "metrics/text.py", "merge/__init__.py", "train/stage.py")
    for name in (*names, "steps/training.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    monkeypatch.setattr("medforge.workspace._PACKAGE", package)

    def after(name: str) -> tuple[bool, bool]:
        before = code_digest("merge"), code_digest()
        (package / name).write_text((package / name).read_text() + "2")
        return code_digest("merge") != before[0], code_digest() != before[1]

    assert after("merge/__init__.py") == (True, True)
    assert after("models/load.py") == (True, True)
    assert after("metrics/text.py") == (True, True)
    assert after("files.py") == (True, True)
    assert after("steps/training.py") == (True, True)
    assert after("train/stage.py") == (False, True)
    assert after("cli.py")[0] is False
