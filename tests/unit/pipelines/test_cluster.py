"""Pipelines for a cluster against Kubeflow's own definitions, and a cluster's mistakes."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from medforge.config import load_config, parse_config
from pipelines import settle
from pipelines.cluster import NEVER_CACHED, STEPS, ClusterConfig, check_run, load_cluster, seconds
from pipelines.compile import main, pipeline_of, write

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "pipelines/clusters/example.yaml"
RUN = ROOT / "pipelines/configs/phantom.yaml"
STORED = ["checkpoints.url=s3://medforge/checkpoints"]
Documents = tuple[dict[str, Any], dict[str, Any]]


def compiled(*overrides: str, pipeline: str = "retrain", cluster: Path = EXAMPLE) -> Documents:
    text = compiled_text(cluster.read_text(), overrides, pipeline)
    spec, platform = yaml.load_all(text, yaml.CSafeLoader)
    return spec, platform


@lru_cache
def compiled_text(cluster: str, overrides: tuple[str, ...], pipeline: str) -> str:
    """The pipeline's YAML; compiling takes a second."""
    config = load_config(RUN, [*STORED, *overrides])
    with TemporaryDirectory() as folder:
        path, out = Path(folder) / "cluster.yaml", Path(folder) / "pipeline.yaml"
        path.write_text(cluster)
        write(pipeline_of(pipeline, config, load_cluster(path)), out)
        return out.read_text()


def check_against_kubeflow(spec: dict[str, Any], platform: dict[str, Any]) -> dict[str, Any]:
    """An unknown or misspelt key raises. Returns what Kubernetes is told, by executor."""
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for executor in executors.values():
        json_format.ParseDict(executor, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    assert executors.keys() == spec["deploymentSpec"]["executors"].keys()
    return dict(executors)


def tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task that runs a component, of the root and of what is nested in it, by its executor's name."""
    found = {}
    for dag in [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]:
        for task in dag["tasks"].values():
            component = spec["components"][task["componentRef"]["name"]]
            if "executorLabel" in component:
                found[component["executorLabel"].removeprefix("exec-")] = task
    return found


@pytest.fixture
def change(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the example with fields replaced, such as images__allow_tags=True."""

    def write_changed(**changes: Any) -> Path:
        tree = yaml.safe_load(EXAMPLE.read_text())
        for name, value in changes.items():
            *parents, last = name.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write_changed


def test_every_step_gets_what_the_cluster_says() -> None:
    spec, platform = compiled("data.shards=3")
    kubernetes = check_against_kubeflow(spec, platform)
    images = {name: executor["container"]["image"] for name, executor in spec["deploymentSpec"]["executors"].items()}
    for name, image in images.items():
        with_model = name.removeprefix("exec-").split("-")[0] in ("base", "validate", "train", "merge", "predict")
        assert ("/train@sha256:" if with_model else "/data@sha256:") in image, name
    container = spec["deploymentSpec"]["executors"]["exec-train-first"]["container"]
    assert container["resources"] | {"accelerator": None} == {
        "resourceCpuLimit": "8",
        "resourceCpuRequest": "8",
        "resourceMemoryLimit": "64Gi",
        "resourceMemoryRequest": "64Gi",
        "cpuLimit": 8.0,
        "cpuRequest": 8.0,
        "memoryLimit": 68.719476736,
        "memoryRequest": 68.719476736,
        "accelerator": None,
    }
    accelerator = container["resources"]["accelerator"]
    assert (accelerator["resourceType"], accelerator["resourceCount"]) == ("nvidia.com/gpu", "1")
    train, convert = kubernetes["exec-train-first"], kubernetes["exec-convert-shard"]
    assert train["nodeSelector"] == {"labels": {"medforge.io/gpu": "a100"}}
    assert train["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert train["activeDeadlineSeconds"] == str(3 * 86400)
    mounts = {mount["mountPath"]: mount for mount in train["emptyDirMounts"]}
    assert (mounts["/dev/shm"]["medium"], mounts["/dev/shm"]["sizeLimit"]) == ("Memory", "16Gi")
    assert mounts["/tmp"]["sizeLimit"] == "200Gi"
    assert "nodeSelector" not in convert and convert["activeDeadlineSeconds"] == str(4 * 3600)
    for name, executor in kubernetes.items():
        assert executor["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
        assert [secret["secretName"] for secret in executor["imagePullSecret"]] == ["registry"]
        (secret,) = executor["secretAsEnv"]
        assert [entry["envVar"] for entry in secret["keyToEnv"]] == ["MEDFORGE_S3_ACCESS_KEY", "MEDFORGE_S3_SECRET_KEY"]
        environment = spec["deploymentSpec"]["executors"][name]["container"]["env"]
        assert {"name": "MEDFORGE_S3_ENDPOINT", "value": "s3.example.org"} in environment
    assert platform["platforms"]["kubernetes"]["pipelineConfig"] == {
        "activeDeadlineSeconds": 604800,
        "resourceTtlOnCompletion": 604800,
    }


def test_only_what_the_sources_and_images_decide_is_cached() -> None:
    spec, _ = compiled()
    found = tasks(spec)
    cached = {name for name, task in found.items() if task["cachingOptions"].get("enableCache")}
    assert set(found) - cached == {"sources", "publish"}
    assert set(found) - cached <= set(NEVER_CACHED)
    # what stands outside is told to Kubeflow's cache as a parameter's value
    for name, output in (("convert", "data"), ("base", "base")):
        seen = found[name]["inputs"]["parameters"]["seen"]["taskOutputParameter"]
        assert seen == {"producerTask": "sources", "outputParameterKey": output}


def test_each_step_is_told_its_own_part_of_the_configuration() -> None:
    """So that a change elsewhere leaves its key in Kubeflow's cache as it is."""
    spec, _ = compiled("data.shards=3")
    root = spec["root"]["dag"]["tasks"]
    found = tasks(spec)
    for name, task in found.items():
        if name.startswith(("settings", "sources", "publish")):
            continue
        source = task["inputs"]["parameters"]["config"]
        if "componentInputParameter" in source:  # within a loop: what the loop was given
            inner = source["componentInputParameter"]
            (source,) = {
                yaml.safe_dump(outer["inputs"]["parameters"][inner])
                for outer in root.values()
                if inner in outer.get("inputs", {}).get("parameters", {})
            }
            source = yaml.safe_load(source)
        step = name.partition("-")[0]
        told = source["taskOutputParameter"]
        if step == "train":
            told_by = root[told["producerTask"]]["inputs"]["parameters"]["stage"]
            assert told_by == task["inputs"]["parameters"]["stage"]
        else:
            assert told == {"producerTask": "settings", "outputParameterKey": step}
    assert {"settings", "settings-stage"} <= {
        name for name, task in found.items() if task["cachingOptions"].get("enableCache")
    }


def test_retries_wait_longer_each_time() -> None:
    spec, _ = compiled()
    found = tasks(spec)
    assert found["train-first"]["retryPolicy"] == {
        "maxRetryCount": 5,
        "backoffDuration": "60s",
        "backoffFactor": 2.0,
        "backoffMaxDuration": "3600s",
    }
    assert found["predict"]["retryPolicy"]["maxRetryCount"] == 2


def test_a_local_compilation_knows_nothing_of_a_cluster_before_it(tmp_path: Path) -> None:
    compiled()
    config = load_config(RUN)
    write(pipeline_of("retrain", config, None), tmp_path / "local.yaml")
    text = (tmp_path / "local.yaml").read_text()
    (spec,) = yaml.safe_load_all(text)
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert "sha256:" not in text and not {"sources", "settings"} & set(spec["root"]["dag"]["tasks"])
    assert parse_config(spec["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"]) == config


def test_the_same_configuration_compiles_to_the_same_bytes(tmp_path: Path) -> None:
    config = load_config(RUN, [*STORED, "data.shards=2"])
    for name in ("first.yaml", "second.yaml"):
        write(pipeline_of("retrain", config, load_cluster(EXAMPLE)), tmp_path / name)
    assert (tmp_path / "first.yaml").read_bytes() == (tmp_path / "second.yaml").read_bytes()


def test_tasks_are_set_on_a_short_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """kfp looks up a module for every frame, each time: with hundreds of frames a compilation would take minutes."""
    frames: list[list[str]] = []
    real = settle.settle

    def noted(task: Any, cluster: ClusterConfig) -> None:
        frames.append([frame.name for frame in traceback.extract_stack()])
        real(task, cluster)

    monkeypatch.setattr(settle, "settle", noted)
    pipeline_of("retrain", load_config(RUN, STORED), load_cluster(EXAMPLE))
    assert frames
    assert all(len(one) < 30 and "test_tasks_are_set_on_a_short_stack" not in one for one in frames)


def test_shards_fan_out_and_come_together() -> None:
    spec, _ = compiled("data.shards=3")
    loops = [task for task in spec["root"]["dag"]["tasks"].values() if "parameterIterator" in task]
    assert [yaml.safe_load(loop["parameterIterator"]["items"]["raw"]) for loop in loops] == [[0, 1, 2]] * 2
    assert {"convert-join", "validate-join", "convert-shard", "validate-shard"} <= set(tasks(spec))


def test_the_release_pipeline_has_the_reviewers_keys(change: Callable[..., Path]) -> None:
    spec, platform = compiled(pipeline="release")
    kubernetes = check_against_kubeflow(spec, platform)
    assert {"approved", "promote"} <= set(tasks(spec))
    for executor in kubernetes.values():
        (keys,) = executor["configMapAsEnv"]
        assert keys["configMapName"] == "medforge-reviewers"
        assert keys["keyToEnv"] == [{"configMapKey": "reviewers.pub", "envVar": "MEDFORGE_TRUSTED_KEYS"}]
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks(spec).values())
    with pytest.raises(ValueError, match=r"^trusted_keys: the cluster's file names no reviewers' keys"):
        compiled(pipeline="release", cluster=change(trusted_keys=None))


WATCHED = {"env": {"MEDFORGE_PROMETHEUS_URL": "http://prometheus:9090"}}


def compile_release(path: Path, cluster: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    words = f"compile --pipeline release --cluster {cluster} --out {path} {words}"
    monkeypatch.setattr("sys.argv", words.split())
    return main()


def test_a_canarys_watch_is_set_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Path]
) -> None:
    words = "--release abc --canary 10 --serving serving --watch-minutes 45.5 --watch-requests 250"
    assert compile_release(tmp_path / "out.yaml", change(**WATCHED), words, monkeypatch) == 0
    spec, platform = yaml.safe_load_all((tmp_path / "out.yaml").read_text())
    check_against_kubeflow(spec, platform)
    defaults = {name: value["defaultValue"] for name, value in spec["root"]["inputDefinitions"]["parameters"].items()}
    assert defaults == {
        "release": "abc",
        "bucket": "medforge",
        "channel": "champion",
        "canary": 10,
        "namespace": "serving",
        "name": "medforge",
        "watch_minutes": 45.5,
        "watch_requests": 250,
    }
    given = tasks(spec)["watch"]["inputs"]["parameters"]
    assert given["minutes"]["componentInputParameter"].endswith("watch_minutes")
    assert given["requests"]["componentInputParameter"].endswith("watch_requests")


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ("--canary 101", {}, "--canary is 101; 0 to 100 percent"),
        ("--canary 10", {}, "--serving is missing: name the namespace of the chart"),
        ("--watch-minutes 5", {}, "--watch-minutes: has an effect with a canary alone; add --canary PERCENT"),
        ("--canary 10 --serving a --watch-minutes 0", {}, "--watch-minutes is 0; more than 0"),
        ("--canary 10 --serving a --watch-minutes nan", {}, "--watch-minutes is nan; more than 0"),
        ("--canary 10 --serving a --watch-requests -1", {}, "--watch-requests is -1; at least 0"),
        ("--canary 10 --serving a", {"env": {}}, "env.MEDFORGE_PROMETHEUS_URL: is missing in the cluster's file"),
        ("--canary 10 --serving a --watch-minutes 61", {}, "steps.watch.timeout: 4h is less than 4 times"),
        ("--canary 10 --pipeline retrain", {}, "--canary: has an effect with --pipeline release alone"),
    ],
)
def test_a_watch_that_makes_no_sense_is_refused(
    words: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[..., Path],
) -> None:
    assert compile_release(tmp_path / "out.yaml", change(**(WATCHED | changes)), words, monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pipeline-compile: {message}")
    assert not (tmp_path / "out.yaml").exists()


def test_the_hubs_token_goes_to_the_base_alone(change: Callable[..., Path]) -> None:
    cluster = change(hub_token={"secret": "hub", "key": "token"})
    _, platform = compiled(cluster=cluster)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    having = {
        name
        for name, executor in executors.items()
        if any(entry["envVar"] == "HF_TOKEN" for secret in executor["secretAsEnv"] for entry in secret["keyToEnv"])
    }
    assert having == {"exec-base"}


@pytest.mark.parametrize("path", sorted(EXAMPLE.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_sound(path: Path) -> None:
    check_against_kubeflow(*compiled(cluster=path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images__data": "medforge/data:0.1.0"}, r"images: data: medforge/data:0\.1\.0 is no digest .* allow_tags"),
        (
            {"images__data": "medforge/data:0.1.0", "images__allow_tags": True},
            "cache: a step would be reused although its tag means another image",
        ),
        ({"steps__trian": {"cpu": "1"}}, "steps.trian: is no step; there are base, train"),
        ({"steps__convert": {"gpu": {"count": 1}}}, "steps.convert.gpu: the step computes on no GPU"),
        ({"defaults__gpu": {"count": 1}}, "defaults.gpu: most steps have no use for one"),
        ({"defaults__cpu": "16Gi"}, "defaults.cpu: String should match pattern"),
        ({"defaults__memory": "lots"}, "defaults.memory: String should match pattern"),
        ({"defaults__timeout": "4 hours"}, "defaults.timeout: String should match pattern"),
        ({"steps__train__gpu__cuont": 2}, r"steps.train.gpu.cuont: is not a setting"),
        ({"store__endpoint": "https://s3.example.org"}, "store.endpoint: String should match pattern"),
        ({"env": {"MEDFORGE_S3_ENDPOINT": "x"}}, "env.MEDFORGE_S3_ENDPOINT: is set by other fields"),
        ({"env": {"A-B": "x"}}, "env.A-B: is no name of a variable"),
        (
            {"defaults__tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
            r"defaults.tolerations.0: value: has no effect with operator Exists",
        ),
    ],
)
def test_a_mistake_in_a_clusters_file_is_named(
    change: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_cluster(change(**changes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=/data/slake"], "data.source: /data/slake is on this machine"),
        (["parallel.processes=2"], "steps.train.gpu.count: 1 GPUs for 2 processes"),
        (["parallel.nodes=2"], "parallel.nodes: 2 machines take the section `nodes`"),
        (["checkpoints.url=''"], "steps.train.retries: a training that is tried again would begin anew"),
    ],
)
def test_a_run_that_the_cluster_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(load_config(RUN, [*STORED, *overrides]), load_cluster(EXAMPLE))


def test_a_step_takes_the_defaults_where_it_says_nothing() -> None:
    cluster = load_cluster(EXAMPLE)
    merge = cluster.step("merge")
    assert (merge.memory, merge.cpu, merge.timeout) == ("64Gi", "2", "4h")
    assert cluster.step("gate") == cluster.defaults
    assert [seconds(time) for time in ("90s", "30m", "24h", "7d")] == [90, 1800, 86400, 604800]


def test_every_component_is_a_step_that_a_cluster_knows() -> None:
    folders = {path.parent.name for path in ROOT.glob("components/*/component.py")}
    assert folders <= set(STEPS)


def test_a_mistake_leaves_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Callable[..., Path]
) -> None:
    cluster = change(images__data="medforge/data:0.1.0")
    monkeypatch.setattr("sys.argv", ["compile", "--cluster", str(cluster), "--out", str(tmp_path / "out.yaml")])
    assert main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pipeline-compile: {cluster}: images: data: medforge/data:0.1.0 is no digest")
    assert not (tmp_path / "out.yaml").exists()
