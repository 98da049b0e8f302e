"""Steps whose disk is gone with their pod, against a real object store: what they go on from, and what they see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medforge.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PhantomConfig,
    PolicyConfig,
    RuleConfig,
    RunConfig,
    StageConfig,
    TinyConfig,
)
from medforge.convert import run as convert
from medforge.embedded import serve
from medforge.evaluate import predict
from medforge.evaluate.predictions import read
from medforge.models.tiny import build
from medforge.steps.data import sources
from medforge.storage import Store, connect

BUCKET = "medforge"
EVALUATE = EvaluateConfig(limit=12, batch_size=3, max_new_tokens=3)

# Two batches are answered and at least one copy is sent; then the pod is gone without a word.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from medforge.config import EvaluateConfig, ModelConfig
from medforge.evaluate import copies, predict
from medforge.storage import connect

copies.SECONDS_BETWEEN = 0.0
model, data, folder, url, evaluate = sys.argv[1:]
answer, asked = predict.Answerer.answer, []

def sent():
    with connect() as store:
        return store.has_bucket("medforge") and any(
            entry.key.endswith("manifest.json") for entry in store.list("medforge", "checkpoints"))

def answered(self, *given):
    asked.append(1)
    if len(asked) == 3:
        while not sent():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, *given)

predict.Answerer.answer = answered
predict.run("tuned", Path(model), Path(data), Path(folder) / "tuned.jsonl",
            EvaluateConfig.model_validate_json(evaluate), ModelConfig(), 0, Path(folder) / "copies", url)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch, serve(tmp_path_factory.mktemp("root")) as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        with connect(create=False) as made:
            yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    build(folder, "qwen3-vl", TinyConfig(steps=0))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    convert("phantom", folder, DataConfig(phantom=PhantomConfig(images=24, size=56)))
    return folder


class Pod:
    """Answers in a folder of its own, and counts the batches that it had to answer."""

    def __init__(self, folder: Path, model: Path, data: Path, patch: pytest.MonkeyPatch) -> None:
        self.out, self._work, self._given = folder / "tuned.jsonl", folder / "copies", (model, data)
        self.batches = 0
        answer = predict.Answerer.answer

        def counted(answerer: Any, *given: Any) -> Any:
            self.batches += 1
            return answer(answerer, *given)

        patch.setattr(predict.Answerer, "answer", counted)

    def run(self, url: str, **changes: Any) -> dict[str, Any]:
        evaluate = EVALUATE.model_copy(update=changes)
        return predict.run("tuned", *self._given, self.out, evaluate, ModelConfig(), 0, self._work, url)


@pytest.fixture
def unbroken(tmp_path: Path, model: Path, data: Path) -> bytes:
    out = tmp_path / "unbroken.jsonl"
    predict.run("tuned", model, data, out, EVALUATE, ModelConfig(), 0)
    return out.read_bytes()


def objects(store: Store, prefix: str) -> dict[str, bytes]:
    entries = store.list(BUCKET, prefix) if store.has_bucket(BUCKET) else []
    return {entry.key.removeprefix(f"{prefix}/"): store.get(BUCKET, entry.key) for entry in entries}


def test_answers_of_a_killed_pod_are_gone_on_from_by_the_same_run_alone(
    store: Store, model: Path, data: Path, unbroken: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/checkpoints"
    (tmp_path / "first").mkdir()
    command = [sys.executable, "-c", KILLED, str(model), str(data), str(tmp_path / "first"), url]
    ended = subprocess.run(
        [*command, EVALUATE.model_dump_json()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    left = objects(store, "checkpoints")
    folder = next(iter(left)).split("/")[0]

    def pod(name: str, data: Path = data) -> Pod:
        monkeypatch.undo()
        return Pod(tmp_path / name, model, data, monkeypatch)

    def put_back(place: str = folder) -> None:
        for key in objects(store, f"checkpoints/{place}"):
            store.remove(BUCKET, f"checkpoints/{place}/{key}")
        for key, content in left.items():
            store.put(BUCKET, f"checkpoints/{place}/{key.partition('/')[2]}", content)

    second = pod("second")
    told = second.run(url)
    assert told["reused"] in (3, 6)  # one batch was sent, or two
    assert second.batches == 4 - told["reused"] // 3
    assert second.out.read_bytes() == unbroken
    third = pod("third")  # all was answered, but the launcher did not bring it away
    assert third.run(url)["reused"] == 12
    assert (third.batches, third.out.read_bytes()) == (0, unbroken)

    # another setting has a place of its own; what is put there by mistake is not taken
    other = pod("other")
    assert other.run(url, max_new_tokens=2)["reused"] == 0
    (place,) = {key.split("/")[0] for key in objects(store, "checkpoints")} - {folder}
    put_back(place)
    other = pod("forged")
    assert other.run(url, max_new_tokens=2)["reused"] == 0

    # nor are answers to other data
    convert("phantom", tmp_path / "data", DataConfig(phantom=PhantomConfig(images=24, size=56, seed=1)))
    assert pod("elsewhere", tmp_path / "data").run(url)["reused"] == 0

    # nor bytes that are not those that were sent
    put_back()
    name = next(key for key in left if key.endswith("state.json"))
    broken = left[name].replace(b'\\"prediction\\":\\"', b'\\"prediction\\":\\"x', 1)
    assert broken != left[name]
    store.put(BUCKET, f"checkpoints/{name}", broken)
    anew = pod("anew")
    assert anew.run(url)["reused"] == 0
    assert anew.out.read_bytes() == unbroken
    assert [row.id for row in read(anew.out)]  # and they are sound rows


def test_objects_are_told_apart_by_their_listing(store: Store, tmp_path: Path) -> None:
    def told() -> tuple[str, str]:
        policy = PolicyConfig(name="unit", rules=[RuleConfig(name="good", metric="exact_match", bound=0.5)])
        stages = [StageConfig(name="see", tune=["vision_merger"], steps=1)]
        source = DataConfig(source=f"s3://{BUCKET}/sources/set")
        config = RunConfig(name="unit", data=source, stages=stages, policy=policy, checkpoints=CheckpointConfig())
        return sources(config.to_json())

    store.ensure_bucket(BUCKET)
    store.put(BUCKET, "sources/set/rows.json", b"[1]")
    first = told()
    store.put(BUCKET, "sources/set2/rows.json", b"[1]")  # another source, though its name begins alike
    assert told() == first
    for change in (
        lambda: store.put(BUCKET, "sources/set/rows.json", b"[12]"),
        lambda: store.put(BUCKET, "sources/set/more.json", b"[1]"),
        lambda: store.remove(BUCKET, "sources/set/more.json"),
    ):
        before = told()
        change()
        assert told()[0] != before[0]
        assert told()[1] == first[1]
