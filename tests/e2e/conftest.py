"""A pipeline small enough to be run, and killed, many times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from medforge.files import read_json

PROJECT = Path(__file__).resolve().parents[2]

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"source": "phantom", "phantom": {"images": 24, "size": 64}},
    "model": {
        "base": "tiny:qwen3-vl",
        "max_pixels": 4096,
        "max_length": 200,
        "tiny": {"steps": 8, "batch_size": 4},
    },
    "stages": [
        {"name": "align", "tune": ["vision_merger"], "steps": 6, "batch_size": 4, "evaluate_every": 2},
        {
            "name": "instruct",
            "tune": ["language_attention"],
            "steps": 6,
            "batch_size": 4,
            "evaluate_every": 2,
            "heads": {},
        },
    ],
    "evaluate": {"batch_size": 4, "max_new_tokens": 4, "report_samples": 4},
    # the small model learns nothing; this asks only that the figures are there
    "policy": {"name": "any", "rules": [{"name": "measured", "metric": "exact_match", "bound": 0.0, "min_n": 1}]},
}


@dataclass(frozen=True)
class Place:
    """A folder with its own runs, store and workspace, and a configuration.

    `first` is what the first run's steps wrote, where that is known.
    """

    folder: Path
    first: dict[str, Any] = field(default_factory=dict)

    def write(self, **changes: Any) -> Path:
        """Write the configuration, with top-level sections replaced."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(SMALL | changes))
        return path

    def command(self, *arguments: str) -> list[str]:
        """The command line of a run here."""
        folders = ["--runs", str(self.folder / "runs"), "--root", str(self.folder / "root")]
        return [sys.executable, "-m", "pipelines.run", "--config", str(self.folder / "run.yaml"), *folders, *arguments]

    def environment(self) -> dict[str, str]:
        """One thread: two would contend with the other tests for two cores."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEDFORGE_")}
        return kept | {"OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the pipeline to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=PROJECT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=500,
        )

    def start(self) -> subprocess.Popen[str]:
        """Start the pipeline."""
        return subprocess.Popen(
            self.command(),
            cwd=PROJECT,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # a shell that starts this in the background makes SIGINT ignored, which children inherit
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def latest(self) -> dict[str, Any]:
        """The newest run's run.json."""
        manifest: dict[str, Any] = read_json(self.folder / "runs" / "latest" / "run.json")
        return manifest

    def digests(self) -> dict[str, Any]:
        """What the newest run's steps wrote, by step, and the release."""
        manifest = self.latest()
        return {step["task"]: step["outputs"] for step in manifest["steps"]} | {"release": manifest["release"]}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty place with the small configuration."""
    made = Place(tmp_path)
    made.write()
    return made


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Place]:
    """The place of a run that nothing disturbed; run when first asked for."""
    made: list[Place] = []

    def get() -> Place:
        if not made:
            place = Place(tmp_path_factory.mktemp("unbroken"))
            place.write()
            done = place.run()
            assert done.returncode == 0, done.stdout + done.stderr
            place.first.update(place.digests())
            made.append(place)
        return made[0]

    return get
