"""A stage on several machines: the TrainJob against Kubeflow's own models, its way to the end, and two real nodes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from medforge.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PhantomConfig,
    StageConfig,
    TinyConfig,
    load_config,
)
from medforge.convert import run as convert
from medforge.embedded import serve
from medforge.storage import Store, connect
from medforge.train import passage, trainjob
from medforge.train.job import Job
from medforge.train.stage import Inputs, job_of, run, told
from pipelines.cluster import load_cluster
from pipelines.nodes import train_nodes

ROOT = Path(__file__).resolve().parents[3]
NODES = json.dumps({"bucket": "medforge", "spec": {"trainer": {"numNodes": 2}, "runtimeRef": {"name": "torch"}}})
STAGE = StageConfig(name="see", tune=["vision_merger"], steps=3, batch_size=4, learning_rate=4e-3, validation_samples=4)


class Cluster(ThreadingHTTPServer):
    """The Kubernetes API's trainjobs and pods, in memory; `play` says what a look at the TrainJob finds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log: list[str] = []
        self.failures: list[int] = []
        self.pod_log = ""
        self.play: Callable[[dict[str, Any]], None] = lambda job: None
        self.api = SimpleNamespace(
            url=f"http://127.0.0.1:{self.server_port}", namespace="team", tls=None, token=lambda: "secret"
        )


class Handler(BaseHTTPRequestHandler):
    server: Cluster

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def answer(self, status: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        url = urlsplit(self.path)
        self.server.log.append(f"{self.command} {url.path}")
        assert self.headers["authorization"] == "Bearer secret"
        if self.server.failures:
            self.answer(self.server.failures.pop(0), {"message": "not now"})
            return
        parts = url.path.strip("/").split("/")
        jobs = self.server.jobs
        if parts[0] == "api" and parts[-1] == "log":
            assert parse_qs(url.query)["container"] == ["node"]
            self.answer(200, self.server.pod_log)
        elif parts[0] == "api":
            assert "batch.kubernetes.io/job-completion-index=0" in parse_qs(url.query)["labelSelector"][0]
            self.answer(200, {"items": [{"metadata": {"name": "node-0"}, "status": {"phase": "Running"}}]})
        elif self.command == "POST":
            wanted = json.loads(body)
            name = wanted["metadata"]["name"]
            known = name in jobs
            jobs.setdefault(name, wanted)
            self.answer(409 if known else 201, {"message": "already exists"} if known else wanted)
        elif parts[-1] not in jobs:
            self.answer(404, {"message": "not found"})
        elif self.command == "DELETE":
            self.answer(200, jobs.pop(parts[-1]))
        else:
            self.server.play(jobs[parts[-1]])
            self.answer(200, jobs[parts[-1]])

    do_GET = do_POST = do_DELETE = handle_any  # noqa: N815  http.server's names


def end(job: dict[str, Any], kind: str) -> None:
    job["status"] = {"conditions": [{"type": kind, "status": "True", "reason": "R", "message": "told by Kubeflow"}]}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    from medforge.models.tiny import build

    folder = tmp_path_factory.mktemp("material")
    build(folder / "base", "qwen3-vl", TinyConfig(steps=0))
    convert("phantom", folder / "data", DataConfig(phantom=PhantomConfig(images=24, size=56)))
    return Inputs(folder / "base", folder / "data", None)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with serve(tmp_path / "root") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with connect(create=False) as made:
            yield made


def job_in(folder: Path, material: Inputs) -> Job:
    parallel = ParallelConfig(nodes=2)
    places = (folder / "out", folder / "work", folder / "logs")
    return job_of(material, *places, STAGE, ModelConfig(), 0, parallel)


def finish(store: Store, job: Job) -> None:
    """What node 0 does at its end."""
    (place,) = {key.split("/")[1] for key, *_ in store.list("medforge", "trainjobs/") if key.endswith("job.json")}
    made = job.model_copy(update={"out": job.work / "made", "logs": job.work / "said"})
    for folder in (made.out, made.logs):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_text("made")
    passage.deliver(store, passage.Passage("medforge", f"trainjobs/{place}"), made)


def test_the_trainjob_is_one_that_kubeflow_knows(tmp_path: Path) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    text = (ROOT / "pipelines/clusters/example.yaml").read_text() + "nodes: {runtime: torch-distributed}\n"
    (tmp_path / "cluster.yaml").write_text(text)
    config = load_config(ROOT / "pipelines/configs/phantom.yaml", ["parallel.nodes=3"])
    given = json.loads(train_nodes(config, load_cluster(tmp_path / "cluster.yaml")))
    body = trainjob.body("medforge-see-0123456789", given["spec"], passage.Passage("medforge", "trainjobs/0123456789"))
    parsed = models.TrainerV1alpha1TrainJob.from_dict(body)
    # what the models do not know would be lost on the way
    assert json.loads(json.dumps(parsed.to_dict(), default=str)) == body
    assert (parsed.spec.trainer.num_nodes, parsed.spec.trainer.num_proc_per_node) == (3, 1)
    assert parsed.spec.trainer.args == ["s3://medforge/trainjobs/0123456789"]
    assert body["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "1"


def test_it_is_made_followed_and_removed(
    cluster: Cluster, store: Store, material: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_in(tmp_path, material)
    looks: list[int] = []

    def play(found: dict[str, Any]) -> None:
        looks.append(1)
        cluster.pod_log = "".join(f"2026-01-01T00:00:0{n}Z step {n}\n" for n in range(1, len(looks) + 1))
        if len(looks) == 3:
            finish(store, job)
            end(found, "Complete")

    cluster.play = play
    trainjob.run(cluster.api, store, job, NODES, poll=0.01)
    assert (job.out / "file").read_text() == "made"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")] == [
        "step 1",
        "step 2",
        "step 3",
    ]
    assert not cluster.jobs
    cluster.log.clear()
    trainjob.run(cluster.api, store, job_in(tmp_path / "again", material), NODES)
    assert cluster.log == []  # the result stands in the store


def test_a_failed_one_says_why_and_a_left_one_is_followed(
    cluster: Cluster, store: Store, material: Inputs, tmp_path: Path
) -> None:
    cluster.play = lambda found: end(found, "Failed")
    with pytest.raises(RuntimeError, match="failed: R: told by Kubeflow"):
        trainjob.run(cluster.api, store, job_in(tmp_path, material), NODES, poll=0.01)
    assert not cluster.jobs
    job = job_in(tmp_path, material)
    place = passage.send(store, "medforge", job)
    name = f"medforge-see-{place.id[:10]}"
    cluster.jobs[name] = {"metadata": {"name": name}}

    looks: list[int] = []

    def play(found: dict[str, Any]) -> None:
        looks.append(1)
        if len(looks) > 2:
            store.put(place.bucket, place.key("error.txt"), b"node 1: the loss is not finite")
            end(found, "Failed")

    cluster.play = play
    with pytest.raises(RuntimeError, match="failed: node 1: the loss is not finite"):
        trainjob.run(cluster.api, store, job, NODES, poll=0.01)
    cluster.failures = [403]
    with pytest.raises(ValueError, match="needs create, get and delete on trainjobs"):
        trainjob.run(cluster.api, store, job, NODES, poll=0.01)
    cluster.failures = [404, 403]  # refused, and what there is not may not be removed
    with pytest.raises(ValueError, match="answers 404: not now; is Kubeflow's trainer"):
        trainjob.run(cluster.api, store, job, NODES, poll=0.01)


def test_sigterm_removes_it(cluster: Cluster, store: Store, material: Inputs, tmp_path: Path) -> None:
    cluster.play = lambda found: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        trainjob.run(cluster.api, store, job_in(tmp_path, material), NODES, poll=0.01)
    assert stopped.value.code == 143
    assert not cluster.jobs


def start_nodes(place: passage.Passage) -> list[subprocess.Popen[str]]:
    """Two pods of a TrainJob: what Kubeflow starts in each, with the variables that it sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pods = []
    for rank in range(2):
        variables = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | variables | {"PET_MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "medforge.train.node", place.url]
        pods.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
        )
    return pods


def ended(pods: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Their exit statuses, and what they said."""
    try:
        said = [pod.communicate(timeout=150)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    return [pod.returncode for pod in pods], said


@pytest.mark.slow
def test_two_nodes_train_what_one_machine_does_though_one_is_killed(
    store: Store, material: Inputs, tmp_path: Path
) -> None:
    """The killed one's peer ends too and says so; the next pair, with empty disks, goes on from the store.

    That it shards the weights (ZeRO-3), which the first did not, changes nothing.
    """
    stage = STAGE.model_copy(update={"steps": 10, "checkpoint_every": 1})
    job = job_in(tmp_path, material).model_copy(update={"stage": stage})
    place = passage.send(store, "medforge", job)
    pods = start_nodes(place)
    while not any(key.endswith("manifest.json") for key, *_ in store.list("medforge", place.key("checkpoints"))):
        assert [pod.poll() for pod in pods] == [None, None], ended(pods)
        time.sleep(0.01)
    pods[1].kill()
    codes, said = ended(pods)
    assert codes == [1, -signal.SIGKILL], said
    assert place.error(store).startswith("node 0: stage 'see': the training processes ended with 1")
    assert not place.is_done(store)

    if importlib.util.find_spec("deepspeed"):
        job = job.model_copy(update={"parallel": ParallelConfig(nodes=2, strategy="zero3")})
    assert passage.send(store, "medforge", job) == place  # what the step does when it is tried again
    assert not place.error(store)
    codes, said = ended(start_nodes(place))
    assert codes == [0, 0], said
    assert re.search(r"see: goes on after step [1-9]", said[0]), said[0]
    passage.collect(store, place, job)
    alone = job_in(tmp_path / "alone", material)
    run(material, alone.out, alone.work, alone.logs, stage, ModelConfig(), 0)
    for row, other in zip(told(alone)["curves"], told(job)["curves"], strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
