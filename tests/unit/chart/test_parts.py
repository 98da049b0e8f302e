"""What the manifests say to MedForge's own programs, against these programs: variables, arguments, files."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
import yaml

from medforge import __version__
from medforge.cli import parser as medforge_parser
from medforge.config import load_config
from medforge.release.promote import trusted_keys
from medforge.release.sign import load_public_key
from medforge.rollout.routing import candidate_url, parse
from medforge.rollout.services import canary_of, check_managed, checks_itself, release_of, with_release
from medforge.rollout.watch import _sees
from pipelines import kubeflow
from pipelines.client import MOUNTED_TOKEN
from pipelines.cluster import load_cluster
from pipelines.cron import parse as parse_cron
from serving.gateway.settings import PREFIX, Settings, load
from serving.predictor.__main__ import parser as predictor_parser
from tests.unit.chart.rendering import (
    EVERYTHING,
    OTHER,
    PILOT,
    PRODUCTION,
    RELEASE,
    SCHEDULE,
    SETS,
    Object,
    Values,
    merged,
    objects,
    one,
)  # fmt: skip

SECRETS = {
    "secret-key": "0123456789abcdef0123456789abcdef",
    "database-url": "postgresql+psycopg://medforge:x@db/medforge",
    "redis-url": "redis://redis:6379/0",
    "upstream-key": "token",
}


def environment(container: Object) -> dict[str, str]:
    """The variables of a container, with secrets of the test's."""
    return {
        entry["name"]: entry["value"] if "value" in entry else SECRETS[entry["valueFrom"]["secretKeyRef"]["key"]]
        for entry in container["env"]
    }


def gateway(values: Values) -> Object:
    """The gateway's pod."""
    spec = one(objects(values), "Deployment")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def settings(values: Values, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    """The gateway's settings as it reads them in the pod."""
    monkeypatch.chdir(tmp_path)
    found = objects(values)
    routing = tmp_path / "routing.json"
    routing.write_text(one(found, "ConfigMap", "medforge-routing")["data"]["routing.json"])
    for name, value in environment(gateway(values)["containers"][0]).items():
        monkeypatch.setenv(name, value.replace("/etc/medforge/routing/routing.json", str(routing)))
    return load()


@pytest.mark.parametrize("name", SETS)
def test_the_gateway_starts_with_its_variables(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert settings(SETS[name], monkeypatch, tmp_path).host == "0.0.0.0"


def test_the_gateway_gets_what_the_values_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = settings(EVERYTHING, monkeypatch, tmp_path)
    assert found.environment == "production" and found.rate == "60/minute" and found.drain_seconds == 12.5
    assert found.allowed_hosts == [
        "medforge.hospital.example", "medforge-gateway", "medforge-gateway.med.svc",
        "medforge-gateway.med.svc.cluster.local",
    ]  # fmt: skip
    assert found.database == SECRETS["database-url"] and found.redis == SECRETS["redis-url"]
    assert found.upstream_key.get_secret_value() == SECRETS["upstream-key"]
    assert found.data_dir == Path("/data") and found.port == 8080
    pod = gateway(EVERYTHING)
    mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    variables = environment(pod["containers"][0])
    for name in ("REFERENCE", "ROUTING"):
        assert str(Path(variables[PREFIX + name]).parent) in mounted
    assert str(found.reference) == variables[PREFIX + "REFERENCE"]


def test_a_gateways_pod_goes_on_for_as_long_as_it_drains() -> None:
    for values, drains in ((PRODUCTION, Settings.model_fields["drain_seconds"].default), (EVERYTHING, 12.5)):
        pod = gateway(values)
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["sleep", "5"]
        assert pod["terminationGracePeriodSeconds"] >= 5 + drains + 4


def test_gateways_on_a_shared_database_roll_without_a_gap_and_on_sqlite_one_by_one() -> None:
    assert one(objects(PRODUCTION), "Deployment")["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    assert one(objects(PILOT), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("name", ["production", "everything", "gitops", "keys elsewhere"])
def test_the_predictor_takes_its_arguments(name: str) -> None:
    found = objects(SETS[name])
    runtime = one(found, "ServingRuntime")["spec"]
    container = runtime["containers"][0]
    for service in (o for o in found if o["kind"] == "InferenceService"):
        given = predictor_parser().parse_args(container["args"] + service["spec"]["predictor"]["model"]["args"])
        assert given.http_port == container["ports"][0]["containerPort"]
        assert given.release == service["metadata"]["annotations"]["medforge.io/release"]
        assert given.model_dir == "/mnt/models" and given.trusted and not given.allow_unsigned
        longest = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
        assert longest > given.timeout + 1 + int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert (
            service["spec"]["predictor"]["model"]["modelFormat"]["name"]
            == (runtime["supportedModelFormats"][0]["name"])
        )
    keys = next((o["data"] for o in found if o["metadata"]["name"] == "medforge-reviewers"), None)
    for path in given.trusted:
        assert str(path.parent) == "/etc/medforge/reviewers"
        assert keys is None or path.name in keys


def test_the_reviewers_keys_are_keys_for_predictor_and_pipelines(tmp_path: Path) -> None:
    data = one(objects(PRODUCTION), "ConfigMap", "medforge-reviewers")["data"]
    file = tmp_path / "dr-smith.pub"
    file.write_text(data["dr-smith.pub"])
    assert [key.public_bytes_raw() for key in trusted_keys(data["reviewers.pub"])] == [
        load_public_key(file).public_bytes_raw()
    ]


def test_a_rollout_finds_what_it_changes() -> None:
    """medforge.rollout's own reading of the chart's objects."""
    found = objects(PRODUCTION)
    stable = one(found, "InferenceService")
    stable["metadata"]["namespace"] = "med"
    check_managed(stable)
    assert checks_itself(stable)
    assert release_of(stable) == ("medforge", PRODUCTION["stable"]["release"])
    changed = with_release(stable, RELEASE, {})
    assert release_of(changed) == ("medforge", RELEASE) and RELEASE in changed["spec"]["predictor"]["model"]["args"][1]
    canary = canary_of(stable, "medforge-canary", RELEASE, "run")
    assert canary["metadata"]["labels"]["medforge.io/track"] == "canary"
    assert "medforge-stable" not in json.dumps(canary["spec"]["predictor"]["autoScaling"])
    routing = parse(one(found, "ConfigMap", "medforge-routing")["data"]["routing.json"], "routing.json")
    assert routing.stable.release == PRODUCTION["stable"]["release"]
    assert routing.candidate is None and routing.weight == 0
    assert candidate_url(routing.stable.url, "medforge-stable-predictor", "medforge-canary-predictor") == (
        "http://medforge-canary-predictor.med.svc.cluster.local/openai/v1"
    )
    verbs = {
        (resource, name): rule["verbs"]
        for rule in one(found, "Role")["rules"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }
    assert verbs["configmaps", "medforge-routing"] == ["get", "patch"]


def test_a_watch_finds_the_rules_of_its_own_installation() -> None:
    """medforge.rollout's own reading of the chart's alerts: each is about one namespace and one gateway."""
    groups = one(objects(PRODUCTION), "PrometheusRule")["spec"]["groups"]
    rules = [rule for group in groups for rule in group["rules"] if rule.get("labels", {}).get("rollback") == "true"]
    assert len(rules) >= 3
    for rule in rules:
        assert _sees(rule["expr"], "med", "medforge")
        assert not _sees(rule["expr"], "other", "medforge") and not _sees(rule["expr"], "med", "chest")


def test_with_gitops_a_rollout_refuses_and_the_routing_names_both() -> None:
    found = objects(SETS["gitops"])
    with pytest.raises(ValueError, match="managed by Helm"):
        check_managed(one(found, "InferenceService", "medforge-stable"))
    routing = parse(one(found, "ConfigMap", "medforge-routing")["data"]["routing.json"], "routing.json")
    assert routing.candidate is not None and routing.candidate.release == OTHER and routing.weight == 0.25
    assert routing.candidate.url == "http://medforge-canary-predictor.med.svc.cluster.local/openai/v1"


@pytest.mark.parametrize(
    ("change", "url"),
    [
        ({"runtime": "vllm"}, "http://medforge-stable-predictor.med.svc.cluster.local/v1"),
        ({"servicePort": 8080}, "http://medforge-stable-predictor.med.svc.cluster.local:8080/openai/v1"),
        ({"runtime": "vllm", "existingRuntime": "x"}, "http://medforge-stable-predictor.med.svc.cluster.local/openai/v1"),
        ({"runtime": "vllm", "existingRuntime": "x", "path": "/v1"}, "http://medforge-stable-predictor.med.svc.cluster.local/v1"),
    ],
)  # fmt: skip
def test_where_the_gateway_finds_stable(change: Values, url: str) -> None:
    routing = one(objects(merged(PRODUCTION, {"predictor": change})), "ConfigMap", "medforge-routing")
    assert json.loads(routing["data"]["routing.json"])["stable"]["url"] == url


def test_vllm_is_given_the_merged_model_and_its_accelerators() -> None:
    found = objects(SETS["vllm"])
    container = one(found, "ServingRuntime")["spec"]["containers"][0]
    model = one(found, "InferenceService")["spec"]["predictor"]["model"]
    assert model["args"] == ["--model=/mnt/models/release/model"]
    wanted = {"--tensor-parallel-size=2", "--served-model-name=medforge", "--max-model-len=8192"}
    assert wanted <= set(container["args"])
    assert model["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": "2"}
    assert model["resources"]["requests"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "2"}


@pytest.mark.parametrize("name", ["vllm", "another runtime"])
def test_vllm_loads_only_what_medforge_has_proven(name: str) -> None:
    """KServe adds no storage initializer to a pod that has one (pkg/webhook/admission/pod of kserve/kserve)."""
    from medforge.s3 import is_configured

    service = one(objects(SETS[name]), "InferenceService")
    predictor = service["spec"]["predictor"]
    (before,) = predictor["initContainers"]
    assert before["name"] == "storage-initializer"
    given = medforge_parser().parse_args(before["command"][1:])
    assert (given.release, given.bucket) == release_of(service)[::-1]
    (model,) = [arg.removeprefix("--model=") for arg in predictor["model"]["args"] if arg.startswith("--model=")]
    assert Path(model) == given.out / "model"  # KServe's own would bring it to /mnt/models/model
    mounted = {mount["name"]: mount for mount in before["volumeMounts"]}
    (mine,) = [mount for mount in predictor["model"]["volumeMounts"] if model.startswith(mount["mountPath"])]
    assert mine["readOnly"] and mounted[mine["name"]]["mountPath"] == mine["mountPath"]
    assert given.out.parent == Path(mine["mountPath"])  # it makes the folder itself
    assert given.trusted and {path.parent for path in given.trusted} == {Path(mounted["reviewers"]["mountPath"])}
    assert is_configured({entry["name"]: entry.get("value", "from the secret") for entry in before["env"]})
    assert checks_itself(service)
    service["metadata"]["namespace"] = "med"
    assert (
        OTHER
        in canary_of(service, "medforge-canary", OTHER, "run")["spec"]["predictor"]["initContainers"][0]["command"]
    )


def test_the_runs_account_may_do_what_a_trainjob_asks_and_no_more() -> None:
    role = one(objects(EVERYTHING), "Role", "medforge-trainjobs")
    allowed = {(verb, resource) for rule in role["rules"] for verb in rule["verbs"] for resource in rule["resources"]}
    assert allowed == asked_of_the_api()


def asked_of_the_api() -> set[tuple[str, str]]:
    """What medforge.train.trainjob sends, as the API server reviews it."""
    from medforge.train import trainjob

    class Api:
        url, namespace, tls, token = "http://api", "research", None, None

    asked: set[tuple[str, str]] = set()

    class Answer:
        def __init__(self, status: int, document: Object | str) -> None:
            self.status, self.data = status, json.dumps(document).encode()

    made = False

    def request(method: str, url: str, **_: object) -> Answer:
        nonlocal made
        path = url.partition("?")[0].partition("/namespaces/research/")[2].split("/")
        resource = "/".join([path[0], *path[2:]])
        verb = {"POST": "create", "DELETE": "delete"}.get(method, "get" if len(path) > 1 else "list")
        asked.add((verb, resource))
        if verb == "create" and not made:  # one of an attempt before is there, and failed
            made = True
            return Answer(409, {})
        if resource == "pods":
            return Answer(200, {"items": [{"metadata": {"name": "p"}, "status": {"phase": "Running"}}]})
        state = "Complete" if ("get", "pods/log") in asked else "Failed"
        return Answer(200, {"metadata": {}, "status": {"conditions": [{"type": state, "status": "True"}]}})

    client = trainjob._Client(Api())
    client._http = type("Http", (), {"request": staticmethod(request)})()
    trainjob._start(client, {"metadata": {"name": "x"}}, 0)
    trainjob._Log(client, "x").show()
    trainjob._follow(client, "x", None, None, 0)  # type: ignore[arg-type]
    return asked


def test_without_a_release_nothing_is_served_yet() -> None:
    found = objects(PILOT)
    assert not [o for o in found if o["kind"] == "InferenceService"]
    one(found, "ServingRuntime")
    assert json.loads(one(found, "ConfigMap", "medforge-routing")["data"]["routing.json"])["stable"]["release"] == ""


def test_the_stores_job_is_a_command_with_the_stores_variables() -> None:
    from medforge.s3 import is_configured, read_endpoint

    for values, address in ((PRODUCTION, ("s3.hospital.example:443", True)),
                            (PILOT, ("medforge-seaweedfs.med.svc.cluster.local:8333", False))):  # fmt: skip
        container = one(objects(values), "Job", "medforge-store-check")["spec"]["template"]["spec"]["containers"][0]
        given = medforge_parser().parse_args(container["command"][1:])
        assert given.url == "s3://medforge" and given.create
        variables = {entry["name"]: entry.get("value", "from the secret") for entry in container["env"]}
        assert is_configured(variables)
        assert read_endpoint(variables["MEDFORGE_S3_ENDPOINT"], variables["MEDFORGE_S3_SECURE"]) == address


def test_kubeflows_launcher_is_told_of_the_store() -> None:
    """The provider's fields are those of github.com/kubeflow/pipelines backend/src/v2/config (S3ProviderConfig)."""
    data = one(objects(PRODUCTION), "ConfigMap", "kfp-launcher")["data"]
    assert data["defaultPipelineRoot"] == "s3://medforge/pipelines"
    provider = yaml.safe_load(data["providers"])["s3"]["default"]
    assert provider == {
        "endpoint": "s3.hospital.example:443",
        "region": "us-east-1",
        "disableSSL": False,
        "forcePathStyle": True,
        "credentials": {
            "fromEnv": False,
            "secretRef": {
                "secretName": "medforge-object-store",
                "accessKeyKey": "AWS_ACCESS_KEY_ID",
                "secretKeyKey": "AWS_SECRET_ACCESS_KEY",
            },
        },
    }


def test_the_schedules_job_is_a_command_with_files_that_pipelines_read(tmp_path: Path) -> None:
    found = objects(EVERYTHING)
    pod = one(found, "Job", "medforge-schedule")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"][:3] == ["python", "-m", "pipelines.kubeflow"]
    given = kubeflow._parser().parse_args(container["command"][3:])
    assert given.name == "medforge-retrain" and parse_cron(given.cron, datetime.now(timezone.utc)).text == "0 0 2 * * *"
    for name, text in one(found, "ConfigMap", "medforge-schedule")["data"].items():
        (tmp_path / name).write_text(text)
    for path in (given.config, given.cluster):
        assert str(Path(path).parent) in [mount["mountPath"] for mount in container["volumeMounts"]]
    cluster = load_cluster(tmp_path / Path(given.cluster).name)
    assert cluster.images.pinned and cluster.cache and cluster.images.pull_secrets == ["mirror"]
    assert cluster.store.endpoint == "s3.hospital.example:443" and cluster.store.keys.secret == "medforge-object-store"
    assert cluster.trusted_keys is not None
    assert cluster.trusted_keys.key in one(found, "ConfigMap", cluster.trusted_keys.config_map)["data"]
    assert cluster.step("train").gpu is not None
    assert cluster.service_account == "default-editor"
    run = load_config(tmp_path / Path(given.config).name)
    assert run.name == "nightly" and run.data.source == "s3://medforge/sources/chest/"
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["KF_PIPELINES_NAMESPACE"] == "research"
    assert Path(variables["KF_PIPELINES_SA_TOKEN_PATH"]) == MOUNTED_TOKEN
    token = next(v for v in pod["volumes"] if v["name"] == "token")["projected"]["sources"][0]["serviceAccountToken"]
    assert token["path"] == MOUNTED_TOKEN.name and token["audience"] == "pipelines.kubeflow.org"


def test_a_schedule_without_digests_is_for_a_trial_and_keeps_nothing(tmp_path: Path) -> None:
    values = merged(PILOT, {"pipelines": {"schedule": SCHEDULE}})
    file = tmp_path / "cluster.yaml"
    file.write_text(one(objects(values), "ConfigMap", "medforge-schedule")["data"]["cluster.yaml"])
    cluster = load_cluster(file)
    assert cluster.images.allow_tags and not cluster.cache and not cluster.store.secure
    assert cluster.images.data == f"medforge/data:{__version__}"


def test_every_variable_of_the_gateway_has_the_settings_prefix() -> None:
    names = [entry["name"] for entry in gateway(EVERYTHING)["containers"][0]["env"]]
    assert all(name.startswith(PREFIX) for name in names) and len(names) == len(set(names))
