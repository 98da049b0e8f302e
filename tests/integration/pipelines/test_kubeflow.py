"""The commands against a server that checks each request by the models of Kubeflow's own API client."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines import kubeflow, schedules
from pipelines.client import Kubeflow

ROOT = Path(__file__).resolve().parents[3]
ARGUMENTS = ["--cluster", "pipelines/clusters/example.yaml", "--set", "checkpoints.url=s3://medforge/checkpoints"]
TOKEN, COOKIE = "right-token", "authservice_session=right"
CREATED = "2026-11-21T10:00:00Z"


def check(model: str, body: dict[str, Any]) -> None:
    """Raise unless the body has only fields of the model, of its types."""
    kind = getattr(kfp_server_api, model)
    fields = {json_name: kind.openapi_types[name] for name, json_name in kind.attribute_map.items()}
    for name, value in body.items():
        wanted = fields[name]  # KeyError: no such field
        if wanted.startswith("V2beta1") and isinstance(value, dict):
            check(wanted, value)
        elif wanted in ("str", "bool", "int"):
            # int64 is text in the model; protobuf's JSON takes a number as well
            kinds = {"str": (str, int) if name == "max_concurrency" else str, "bool": bool, "int": int}
            assert isinstance(value, kinds[wanted]), (model, name, value)


class Server(ThreadingHTTPServer):
    """Kubeflow Pipelines of one namespace, in memory. `answers` are given once each, before anything else."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kept: dict[str, dict[str, dict[str, Any]]] = {
            name: {} for name in ("pipelines", "versions", "experiments", "runs", "recurringruns")
        }
        self.log: list[str] = []
        self.enabled: list[int] = []  # how many schedules ran after each change
        self.answers: list[tuple[int, bytes]] = []
        self.states = ["SUCCEEDED"]
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def answer(self, value: Any, status: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.answers:
            status, data = self.server.answers.pop(0)
            self.answer(data, status)
            return
        bearer, cookie = self.headers.get("authorization"), self.headers.get("cookie")
        if bearer != f"Bearer {TOKEN}" and cookie != COOKIE:
            self.answer({"message": "no valid token"}, 401)
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.server.log.append(f"{self.command} {url.path}")
        path = url.path.removeprefix("/apis/v2beta1/")
        try:
            self.route(path, query, body)
        except (AssertionError, KeyError, ValueError) as error:
            self.answer({"message": f"{type(error).__name__}: {error}"}, 400)

    do_GET = do_POST = do_DELETE = handle_any  # noqa: N815  http.server's names

    def listed(self, kind: str, field: str, query: dict[str, str], **wanted: str) -> None:
        if "namespace" in query and query["namespace"] != "team":
            self.answer({"message": f"no right to {query['namespace']}"}, 403)
            return
        items = list(self.server.kept[kind].values())
        items = [item for item in items if all(item.get(name) == value for name, value in wanted.items())]
        if "filter" in query:
            for predicate in json.loads(query["filter"])["predicates"]:
                key, value = predicate["key"], predicate.get("string_value", predicate.get("stringValue"))
                items = [item for item in items if item.get(key) == value]
        place = int(query.get("page_token") or 0)  # two a page, so that paging is needed
        page, rest = items[place : place + 2], items[place + 2 :]
        self.answer({field: page} | ({"next_page_token": str(place + 2)} if rest else {}))

    def route(self, path: str, query: dict[str, str], body: bytes) -> None:
        kept = self.server.kept
        if path == "pipelines/upload_version":
            files = re.search(rb"\r\n\r\n(# PIPELINE.*?)\r\n--", body, re.DOTALL)
            assert files
            spec, _ = yaml.safe_load_all(files.group(1))
            json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
            made = {"pipeline_id": query["pipelineid"], "display_name": query["name"]}
            self.make("versions", "pipeline_version_id", made)
            return
        parts = path.split("/")
        if parts[0] == "pipelines" and len(parts) == 3:
            self.listed("versions", "pipeline_versions", query, pipeline_id=parts[1])
            return
        kind, change = parts[0], parts[1].partition(":")[2] if len(parts) > 1 else ""
        models = {
            "pipelines": ("V2beta1Pipeline", "pipeline_id"),
            "experiments": ("V2beta1Experiment", "experiment_id"),
            "runs": ("V2beta1Run", "run_id"),
            "recurringruns": ("V2beta1RecurringRun", "recurring_run_id"),
        }
        model, key = models[kind]
        if len(parts) == 1 and self.command == "GET":
            self.listed(kind, {"recurringruns": "recurringRuns"}.get(kind, kind), query)
            return
        if len(parts) == 1:
            value = json.loads(body)
            check(model, value)
            if kind == "recurringruns":
                assert len(value["trigger"]["cron_schedule"]["cron"].split()) == 6
                assert (int(value["max_concurrency"]), value["no_catchup"]) == (1, True)
                value["max_concurrency"] = str(value["max_concurrency"])
            assert value.get("namespace", "team") == "team"
            self.make(kind, key, value | {"created_at": CREATED})
            return
        name = parts[1].partition(":")[0]
        if name not in kept[kind]:
            self.answer({"message": f"{name} not found"}, 404)
            return
        if self.command == "DELETE":
            del kept[kind][name]
        elif change:
            kept[kind][name]["mode"] = change.upper()
        elif kind == "runs":
            states = self.server.states
            kept[kind][name]["state"] = states.pop(0) if len(states) > 1 else states[0]
            self.answer(kept[kind][name])
            return
        if kind == "recurringruns":
            self.server.enabled.append(sum(run["mode"] == "ENABLE" for run in kept[kind].values()))
        self.answer({})
        return

    def make(self, kind: str, key: str, value: dict[str, Any]) -> None:
        name = str(uuid.uuid4())
        self.server.kept[kind][name] = value | {key: name}
        self.answer(self.server.kept[kind][name])


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def command(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs a command and returns its status, what it printed and its errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
    monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "team")
    monkeypatch.setenv("KF_PIPELINES_TOKEN", TOKEN)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kubeflow", *arguments])
        status = kubeflow.main()
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def test_a_run_is_submitted_and_followed(server: Server, command: Any) -> None:
    server.states = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    status, out, err = command("submit", *ARGUMENTS, "--wait", "--poll", "0.01")
    assert (status, err) == (0, "")
    (run,) = server.kept["runs"].values()
    (version,) = server.kept["versions"].values()
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert json.loads(run["runtime_config"]["parameters"]["config"])["checkpoints"]["url"].endswith("/checkpoints")
    assert run["runtime_config"]["pipeline_root"] == "s3://medforge/pipelines"
    assert f"{server.url}/#/runs/details/{run['run_id']}" in out
    assert [line.split(": ")[1] for line in out.splitlines()[2:]] == ["PENDING", "RUNNING", "SUCCEEDED"]
    server.states = ["FAILED"]
    status, out, _ = command("submit", *ARGUMENTS, "--wait", "--poll", "0.01", "--name", "second")
    assert status == 1 and out.splitlines()[-1] == "run second: FAILED"
    assert len(server.kept["versions"]) == len(server.kept["pipelines"]) == len(server.kept["experiments"]) == 1
    status, out, _ = command("runs")
    assert status == 0 and "FAILED     2026-11-21 10:00" in out and "second" in out


def test_a_changed_pipeline_is_a_new_version_an_unchanged_one_is_none(server: Server, command: Any) -> None:
    for arguments, count in ((ARGUMENTS, 1), (ARGUMENTS, 1), ([*ARGUMENTS, "--set", "seed=7"], 2)):
        assert command("upload", *arguments)[0] == 0
        assert len(server.kept["versions"]) == count
    assert command("upload", *ARGUMENTS, "--pipeline", "release")[0] == 0
    assert {item["display_name"] for item in server.kept["pipelines"].values()} == {
        "medforge-retrain",
        "medforge-release",
    }


def test_a_release_is_submitted_with_its_canarys_watch(server: Server, command: Any, tmp_path: Path) -> None:
    cluster = yaml.safe_load(Path("pipelines/clusters/example.yaml").read_text())
    cluster["env"] = {"MEDFORGE_PROMETHEUS_URL": "http://prometheus:9090"}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    words = ["submit", "--pipeline", "release", "--cluster", str(tmp_path / "cluster.yaml"), "--canary", "10"]
    status, _, err = command(*words, "--serving", "serving", "--watch-minutes", "20", "--watch-requests", "50")
    assert (status, err) == (0, "")
    assert command("submit", "--pipeline", "release", "--cluster", str(tmp_path / "cluster.yaml"))[0] == 0
    first, second = (run["runtime_config"]["parameters"] for run in server.kept["runs"].values())
    assert first == {
        "bucket": "medforge",
        "canary": 10,
        "namespace": "serving",
        "watch_minutes": 20.0,
        "watch_requests": 50,
    }
    assert second == {"bucket": "medforge"}
    assert len(server.kept["versions"]) == 1  # what is watched is no other pipeline


def test_a_schedule_is_one_of_its_name_at_every_moment(server: Server, command: Any) -> None:
    kept = server.kept["recurringruns"]
    status, out, err = command("schedule", *ARGUMENTS, "--cron", "0 0 2 1 * *", "--end", "2099-01-01T02:00:00+02:00")
    assert (status, err) == (0, "") and "made" in out and "UTC" in out
    (first,) = kept.values()
    assert first["mode"] == "ENABLE"
    assert first["trigger"]["cron_schedule"]["end_time"] == "2099-01-01T00:00:00Z"
    log = len(server.log)
    assert "unchanged" in command("schedule", *ARGUMENTS, "--cron", "0 0 2 1 * *", "--end", "2099-01-01T00:00:00Z")[1]
    assert list(kept.values()) == [first]
    assert not any(line.startswith(("POST", "DELETE")) for line in server.log[log:])
    left = {**first, "recurring_run_id": "left", "mode": "DISABLE"}  # of an attempt that was killed
    kept["left"] = left
    server.enabled.clear()
    assert "replaced" in command("schedule", *ARGUMENTS, "--cron", "0 0 3 1 * *")[1]
    (second,) = kept.values()
    assert (second["mode"], second["trigger"]["cron_schedule"]["cron"]) == ("ENABLE", "0 0 3 1 * *")
    assert max(server.enabled) == 1  # never two at once
    assert "schedule   medforge-retrain: 0 0 3 1 * * (UTC), on" in command("runs")[1]
    status, _, err = command("unschedule", "--name", "other")
    assert status == 1 and "no schedule is named 'other'; there are medforge-retrain" in err
    assert command("unschedule", "--name", "medforge-retrain")[0] == 0
    assert not kept


def test_a_replacement_that_fails_leaves_the_old_schedule_running(
    server: Server, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("schedule", *ARGUMENTS, "--cron", "0 0 2 1 * *")
    change = schedules._set

    def fail(api: Kubeflow, run: Any, how: str) -> None:
        if how == "enable" and run.trigger.cron_schedule.cron == "0 0 3 1 * *":
            server.answers.append((503, b'{"message": "overloaded"}'))
        change(api, run, how)

    monkeypatch.setattr(schedules, "_set", fail)
    status, _, err = command("schedule", *ARGUMENTS, "--cron", "0 0 3 1 * *")
    assert status == 1 and "answers 503: overloaded" in err
    (left,) = server.kept["recurringruns"].values()
    assert (left["mode"], left["trigger"]["cron_schedule"]["cron"]) == ("ENABLE", "0 0 2 1 * *")


def test_mistakes_are_one_clear_line(
    server: Server, command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def error(*arguments: str) -> str:
        status, _, err = command(*arguments)
        (line,) = err.splitlines()
        assert status == 1
        return str(line)

    assert "--cluster is missing" in error("submit")
    assert "has five fields" in error("schedule", *ARGUMENTS, "--cron", "0 2 * * *")
    assert "end: 2020-01-01T00:00:00Z is not after now" in error(
        "schedule", *ARGUMENTS, "--cron", "0 0 2 * * *", "--end", "2020-01-01T00:00:00Z"
    )
    assert "start: 'tomorrow' is no time with a zone" in error(
        "schedule", *ARGUMENTS, "--cron", "0 0 2 * * *", "--start", "tomorrow"
    )
    server.answers = [(503, b"<html>no healthy upstream</html>")]
    assert "answers 503: <html>no healthy upstream" in error("runs")
    server.answers = [(200, b"<html>please log in</html>")]
    assert "something else than JSON, such as a login page" in error("runs")
    monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "other")
    assert "answers 403: no right to other; this account has no right to it in the namespace other" in error("runs")
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "wrong")
    assert "answers 401: no valid token; the token or cookie is not valid" in error("runs")
    monkeypatch.setenv("KF_PIPELINES_COOKIE", COOKIE)
    assert "KF_PIPELINES_TOKEN and KF_PIPELINES_COOKIE are set" in error("runs")
    monkeypatch.delenv("KF_PIPELINES_TOKEN")
    monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "team")
    assert command("runs")[0] == 0
    monkeypatch.delenv("KF_PIPELINES_COOKIE")
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert command("runs")[0] == 0
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert command("runs")[0] == 0
    (tmp_path / "token").write_text("")
    assert "KF_PIPELINES_SA_TOKEN_PATH: is empty; a token is needed" in error("runs")
    (tmp_path / "token").unlink()
    assert "no such file" in error("runs")
    monkeypatch.delenv("KF_PIPELINES_SA_TOKEN_PATH")
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "a secret\nin two lines")
    assert error("runs") == "pipeline-runs: KF_PIPELINES_TOKEN: has a space or line break in it; a token is needed"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", f"{TOKEN}\n")
    assert command("runs")[0] == 0
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in error("runs")
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    assert "KF_PIPELINES_ENDPOINT is ''" in error("runs")


def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(
    server: Server, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.client.SECONDS", (0.2, 0.2))
    monkeypatch.setattr(Handler, "listed", lambda self, *_, **__: threading.Event().wait(1.5))
    status, _, err = command("runs")
    assert status == 1 and "cannot be reached (" in err and "timed out" in err
