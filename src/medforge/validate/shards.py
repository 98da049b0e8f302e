"""What a shard found of its samples, as a file for the step that judges all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medforge.files import read_json, write_json
from medforge.validate.checks import Checked

Task = tuple[str, int, int]  # split, first sample, the one after the last


def write(
    path: Path,
    dataset: str,
    settings: dict[str, Any],
    shard: tuple[int, int],
    tasks: Sequence[Task],
    checked: Sequence[Checked],
) -> None:
    """Write what the samples of `tasks` are, in their order, with all that decided it: digest and settings."""
    rows = [[c.problems, c.length, c.image_tokens, c.answer_tokens] for c in checked]
    assert len(rows) == sum(stop - start for _, start, stop in tasks)
    about = {"dataset": dataset, "settings": settings, "shard": shard[0], "of": shard[1]}
    write_json(path, {**about, "tasks": tasks, "checked": rows})


def read(paths: Sequence[Path], dataset: str, settings: dict[str, Any], tasks: Sequence[Task]) -> Iterator[Checked]:
    """What all shards found, in the order of `tasks`.

    Raises ValueError when a file is of another data set or of other settings, or a sample was not checked just once.
    """
    found: dict[Task, list[Checked]] = {}
    for path in paths:
        file = read_json(path)
        for name, wanted in (("dataset", dataset), ("settings", settings)):
            if file[name] != wanted:
                raise ValueError(f"{path}: its {name} is not that of this step; validate all shards again")
        rows = iter(file["checked"])
        for split, start, stop in file["tasks"]:
            task = (split, start, stop)
            if task in found:
                raise ValueError(f"{path}: {split} samples {start} to {stop} are in another shard already")
            found[task] = [_checked(next(rows)) for _ in range(stop - start)]
    if missing := [task for task in tasks if task not in found]:
        split, start, stop = missing[0]
        raise ValueError(f"no shard has checked {split} samples {start} to {stop} ({len(missing)} such spans)")
    for task in tasks:
        yield from found[task]


def _checked(row: list[Any]) -> Checked:
    problems, *tokens = row
    return Checked(tuple((reason, detail) for reason, detail in problems), *tokens)
