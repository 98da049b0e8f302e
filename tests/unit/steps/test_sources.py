"""`sources` tells two states of a source apart, and one state always the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from components.sources.component import sources as component
from medforge.config import DataConfig, ModelConfig, PolicyConfig, RuleConfig, RunConfig, StageConfig
from medforge.steps.data import sources

POLICY = PolicyConfig(name="unit", rules=[RuleConfig(name="good", metric="exact_match", bound=0.5)])
STAGES = [StageConfig(name="see", tune=["vision_merger"], steps=1)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def outside_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEDFORGE_WORKSPACE", "MEDFORGE_RUN", "MEDFORGE_RUN_PID"):
        monkeypatch.delenv(name, raising=False)


def told(data: str = "phantom", base: str = "tiny:qwen3-vl", revision: str = "main") -> tuple[str, str]:
    """What `sources` says of them: the data's state, the base's state."""
    model = ModelConfig(base=base, revision=revision)
    config = RunConfig(name="unit", data=DataConfig(source=data), model=model, stages=STAGES, policy=POLICY)
    return sources(config.to_json())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source" / "images").mkdir(parents=True)
    (tmp_path / "source" / "rows.json").write_text("[1, 2]")
    (tmp_path / "source" / "images" / "a.png").write_bytes(b"png")
    return tmp_path / "source"


def rewritten(folder: Path) -> None:
    """The same size and name, a moment later: as an export does that is made anew."""
    (folder / "rows.json").write_text("[1, 3]")
    os.utime(folder / "rows.json", ns=(1, 1))


CHANGES: list[Callable[[Path], object]] = [
    rewritten,
    lambda folder: (folder / "rows.json").write_text("[1, 2, 3]"),
    lambda folder: (folder / "images" / "b.png").write_bytes(b"png"),
    lambda folder: (folder / "images" / "a.png").rename(folder / "images" / "b.png"),
    lambda folder: (folder / "images" / "a.png").unlink(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_is_the_same_until_one_of_its_files_changes(folder: Path, change: Callable[[Path], object]) -> None:
    first = told(data=str(folder)), told(base=str(folder))
    assert (told(data=str(folder)), told(base=str(folder))) == first
    change(folder)
    second = told(data=str(folder)), told(base=str(folder))
    assert first[0][0] != second[0][0]  # the data's state, as data …
    assert first[0][1] == second[0][1]  # … and not the base's
    assert first[1][0] == second[1][0]  # and the other way round for the base
    assert first[1][1] != second[1][1]


def test_a_file_is_a_source_as_well(folder: Path) -> None:
    file = folder / "rows.json"
    first = told(data=str(file))
    (folder / "images" / "a.png").write_bytes(b"changed")
    assert told(data=str(file)) == first
    rewritten(folder)
    assert told(data=str(file))[0] != first[0]


def test_what_is_made_or_named_by_its_commit_stays_the_same() -> None:
    assert told() == told()
    assert told(base="Qwen/Qwen3-VL-2B-Instruct", revision=COMMIT) == told(
        base="Qwen/Qwen3-VL-2B-Instruct", revision=COMMIT
    )


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12], COMMIT + "0"])
def test_what_cannot_be_told_is_new_each_time(revision: str) -> None:
    first, second = (told(data="nowhere", base="Qwen/Qwen3-VL-2B-Instruct", revision=revision) for _ in range(2))
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_the_component_names_what_it_returns_in_that_order() -> None:
    assert list(component.component_spec.outputs) == ["data", "base"]
