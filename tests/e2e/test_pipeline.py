"""The whole way: what a run leaves, what a second run reuses, what an interruption costs, what bad input says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from medforge.files import read_json, tree_digest
from tests.e2e.conftest import SMALL, Place

TASKS = [
    *("base", "convert", "validate", "train-align", "train-instruct", "merge", "predict-base", "predict-tuned"),
    *("evaluate", "gate", "report", "publish"),
]


def processes_of(place: Place) -> list[psutil.Process]:
    """The processes, of whatever parent, that work for a run in this place, and its store."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline()) + process.environ().get("MEDFORGE_RUN", "")
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if str(place.folder) in words and process.pid != os.getpid():
            found.append(process)
    return found


def wait_until_none_is_left(place: Place, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while left := processes_of(place):
        assert time.monotonic() < end, f"still running: {left}"
        time.sleep(0.1)


def test_a_run_leaves_what_the_readme_says(unbroken: Callable[[], Place]) -> None:
    place = unbroken()
    run = place.folder / "runs" / "latest"
    names = {path.name for path in run.iterdir()}
    assert {"run.json", "results.json", "comparison.md", "report.html", "verdict.json", "log.txt"} <= names
    manifest = place.latest()
    assert manifest["status"] == "finished"
    assert sorted(step["task"] for step in manifest["steps"]) == sorted(TASKS)
    assert all(step["seconds"] >= 0 and len(step["key"]) == 64 for step in manifest["steps"])
    results = read_json(run / "results.json")
    for arm in ("base", "tuned"):
        for part in ("all", "answer_type=closed", "question_type=modality"):
            assert set(results["arms"][arm][part]["exact_match"]) >= {"value", "n"}
    page = (run / "report.html").read_text()
    assert "generated" in page
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert links and all(link.startswith(("data:", "#")) for link in links)  # self-contained
    store = place.folder / "root" / "store" / "medforge"
    release = store / "releases" / manifest["release"]
    assert read_json(store / "channels" / "candidate.json")["release"] == manifest["release"]
    assert tree_digest(release / "model") == next(
        step["outputs"]["merged"] for step in manifest["steps"] if step["task"] == "merge"
    )


def test_a_second_run_reuses_every_step(unbroken: Callable[[], Place]) -> None:
    place = unbroken()
    before = place.digests()
    done = place.run()
    assert done.returncode == 0, done.stdout + done.stderr
    reused = [step["task"] for step in place.latest()["steps"] if step["reused"]]
    assert sorted(reused) == sorted(set(TASKS) - {"publish"})  # the store is always asked
    assert place.digests() == before
    assert "train-align: reused" in done.stdout
    assert re.search(r"^ +n +base +tuned\nexact_match +\d+", done.stdout, re.MULTILINE)


def test_only_what_a_change_reaches_is_done_again(unbroken: Callable[[], Place]) -> None:
    place = unbroken()
    done = place.run("--set", "stages.1.learning_rate=0.002")
    assert done.returncode == 0, done.stdout + done.stderr
    again = {step["task"] for step in place.latest()["steps"] if not step["reused"]}
    assert again == {"train-instruct", "merge", "predict-tuned", "evaluate", "gate", "report", "publish"}


@pytest.mark.slow
def test_two_processes_train_what_one_does(unbroken: Callable[[], Place], place: Place) -> None:
    """From the pipeline's configuration: each stage is launched on two processes (gloo), with the same curves."""

    def curves(of: Place) -> dict[str, list[dict[str, float]]]:
        first = min(path for path in (of.folder / "runs").iterdir() if not path.is_symlink())
        files = first.glob("artifacts/*/train-next/adapters/*/stage.json")
        return {file.parent.name: read_json(file)["curves"] for file in files}

    place.write(parallel={"processes": 2, "strategy": "zero2"})
    done = place.run()
    assert done.returncode == 0, done.stdout + done.stderr
    alone, together = curves(unbroken()), curves(place)
    assert together.keys() == alone.keys() == {"01-align", "02-instruct"}
    for name, rows in alone.items():
        assert [row["step"] for row in together[name]] == [row["step"] for row in rows]
        for row, other in zip(rows, together[name], strict=True):
            assert other == pytest.approx(row, rel=1e-3, abs=1e-4)


def test_a_damaged_workspace_is_seen_and_done_again(unbroken: Callable[[], Place], place: Place) -> None:
    first = place.run()
    assert first.returncode == 0, first.stdout + first.stderr
    (weights,) = (place.folder / "root" / "workspace" / "merge").glob("*/out/merged/model.safetensors")
    data = weights.read_bytes()
    weights.unlink()  # the run's own copy is a hard link to it, and must stay as it is
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = place.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {step["task"] for step in place.latest()["steps"] if not step["reused"]} == {"merge", "publish"}
    assert place.digests() == unbroken().first


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_in_each_step_ends_like_an_unbroken_one(unbroken: Callable[[], Place], place: Place) -> None:
    wanted = unbroken().first
    for task in TASKS:
        process = place.start()
        assert process.stdout is not None
        for line in process.stdout:
            if f"{task}: running" in line:
                # some way into the step: the long ones have written checkpoints or predictions by then
                time.sleep(4.0 if task.startswith(("train", "predict", "base")) else 0.2)
                break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until_none_is_left(place)
    done = place.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.digests() == wanted
    assert not list((place.folder / "root" / "workspace").glob("*/*.partial"))


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_child(place: Place, signal_number: int) -> None:
    process = place.start()
    assert process.stdout is not None
    for line in process.stdout:
        if "base: running" in line:
            break
    assert len(processes_of(place)) >= 3  # the run, its store, its step
    os.kill(process.pid, signal_number)  # the run alone, as a supervisor would; a terminal tells the children too
    assert process.wait(timeout=20) in (130, 143)
    wait_until_none_is_left(place, seconds=3)
    assert place.latest()["status"] == "failed"


def test_a_candidate_that_fails_is_not_published(unbroken: Callable[[], Place]) -> None:
    place = unbroken()
    rule = {"name": "near-perfect", "metric": "exact_match", "bound": 0.999, "min_n": 1}
    policy = {"name": "strict", "rules": [rule]}
    channel = place.folder / "root" / "store" / "medforge" / "channels" / "candidate.json"
    before = channel.read_bytes()
    done = place.run("--set", f"policy={json.dumps(policy)}")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = place.latest()
    assert (manifest["passed"], manifest["release"]) == (False, None)
    assert "near-perfect" in done.stdout.rpartition("did not pass:\n")[2]
    assert channel.read_bytes() == before
    assert "publish" not in {step["task"] for step in manifest["steps"]}


def test_a_wrong_path_is_told_at_once(place: Place) -> None:
    done = place.run("--data", str(place.folder / "nowhere"))
    assert done.returncode == 1
    assert done.stderr.strip() == f"pipeline-run: DATA {place.folder / 'nowhere'}: no such file or folder"


def test_bad_data_stops_the_run_with_the_file_and_the_line(place: Place) -> None:
    source = place.folder / "data"
    source.mkdir()
    (source / "train.json").write_text('[{"id": 1, "conversations": [')
    place.write(data={"format": "conversations"})
    done = place.run("--data", str(source))
    assert done.returncode == 1
    assert done.stderr.startswith("pipeline-run: convert: ") and "train.json: line 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert place.latest()["status"] == "failed"
    wait_until_none_is_left(place)


def test_an_unknown_setting_names_the_file_and_the_field(place: Place) -> None:
    config = place.write(model=SMALL["model"] | {"max_pixel": 1})
    done = place.run()
    assert done.returncode == 1
    assert done.stderr.startswith(f"pipeline-run: {config}: model.max_pixel: is not a setting")


@pytest.mark.slow
def test_vqa_rad_goes_the_whole_way(place: Place, shared_data: Path) -> None:
    whole, source = shared_data / "vqa_rad", place.folder / "vqa_rad"
    shutil.copytree(whole / "images", source / "images")
    for name, count in (("trainset.json", 500), ("testset.json", 100)):  # the first of 3,064 and 451
        rows = json.loads((whole / name).read_text(encoding="utf-8"))[:count]
        (source / name).write_text(json.dumps(rows), encoding="utf-8")
    place.write(data={"format": "vqa-rad"}, model=SMALL["model"] | {"max_length": 400})
    done = place.run("--data", str(source), "--set", "evaluate.limit=40")
    assert done.returncode == 0, done.stdout + done.stderr
    run = place.folder / "runs" / "latest"
    results = read_json(run / "results.json")
    assert results["arms"]["tuned"]["all"]["exact_match"]["n"] == 40
    assert results["leakage"] is not None
    page = (run / "report.html").read_text()
    assert "overlap" in page.lower() or "shared" in page.lower()
    assert "by-study" in page
