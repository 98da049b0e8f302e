"""The chart's README, which charts/readme.py writes from the values' comments."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.unit.chart.rendering import CHART, file

SCRIPT = CHART.parent / "readme.py"


def test_it_is_up_to_date() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_it_has_every_value_once() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| ", (CHART / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows))

    def leaves(value: object, path: str) -> list[str]:
        if path in rows or not isinstance(value, dict):
            return [path]
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}.{key}".lstrip("."))]

    assert leaves(file("values.yaml"), "") == rows


def test_a_value_without_words_is_found() -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from readme import described  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    assert described("# -- One\n# two.\na: {b: 1}\nc:\n  # -- Three.\n  d: x\n") == [
        ("a", {"b": 1}, "One two."),
        ("c.d", "x", "Three."),
    ]
    with pytest.raises(ValueError, match=r"line 3: c\.d has no description"):
        described("# a file\nc:\n  d: x\n")
