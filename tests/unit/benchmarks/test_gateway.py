"""The gateway's benchmark: the request it sends, what it makes of wrk's output, the table, the command around it."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.gateway import __main__ as command
from benchmarks.gateway import load, measure, report, servers, upstream
from benchmarks.gateway.report import Row

FIGURES = '{"requests": 400, "duration_us": 2000000, "p50_us": 4500, "p99_us": 9000, "bad_status": 0, "broken": 0}'


def row(name: str, p50: list[float], per_second: list[float], error: str | None = None, reads: bool = False) -> Row:
    return Row(
        name, reads, p50, [value * 2 for value in p50], per_second, [30.0] * len(p50), [0.5] * len(p50), error=error
    )


@pytest.fixture
def rows() -> list[Row]:
    """Medians: 1 ms and 1000/s direct, 3 ms and 800/s ours, 5 ms and 250/s the plain proxy's."""
    return [
        row("direct", [1.0, 0.5, 4.0], [1000.0, 900.0, 1100.0]),
        row("medforge", [3.0, 2.0, 9.0], [800.0, 100.0, 900.0]),
        row("fastapi+httpx", [5.0, 5.0, 5.0], [250.0, 250.0, 10.0]),
        row("litellm", [20.0], [40.0], "broke off"),
    ]


def test_the_request_holds_a_png_of_about_200_kb() -> None:
    body = json.loads(load.payload(load.picture()))
    image, text = body["messages"][0]["content"]
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"), validate=True)
    assert 195_000 < len(data) < 205_000
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (258, 258))
    assert text["type"] == "text"
    assert load.picture() == load.picture()


def test_figures_are_read_from_the_end_of_the_output() -> None:
    sent = load.read(f"Running 2s test @ http://127.0.0.1\n  1 threads and 16 connections\n\n{FIGURES}\n")
    assert sent == load.Sent(400, 2.0, 4.5, 9.0)
    assert sent.per_second == 200.0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (FIGURES.replace('"bad_status": 0', '"bad_status": 3'), "3 were answered with an error"),
        (FIGURES.replace('"broken": 0', '"broken": 2'), "2 broke off"),
        (FIGURES.replace("400", "0"), "not one request"),
        ("unable to connect", "told nothing: unable to connect"),
    ],
)
def test_answers_that_are_no_success_are_an_error(output: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load.read(output)


def test_missing_wrk_is_told_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="apt-get install wrk"):
        command.main(["--quick"])


def test_medians_shares_and_differences(rows: list[Row]) -> None:
    direct, ours, plain, broken = rows
    assert (ours.middle("p50_ms"), report.added(ours, rows, "p50_ms"), report.added(ours, rows, "p99_ms")) == (3, 2, 4)
    assert report.added(direct, rows, "p50_ms") is None
    assert [report.share(one, rows) for one in rows] == [1.0, 0.8, 0.25, None]
    assert report.ratio(rows, "fastapi+httpx") == pytest.approx(3.2)
    assert report.ratio(rows, "litellm") is None
    assert (broken.middle("p50_ms"), plain.middle("memory_bytes")) == (None, None)
    assert report.headline(rows) == "gateway: ratio 3.20 over fastapi+httpx"
    # before the upstream that reads, a row is compared with that upstream, and the ratio stays what it was
    slow = [row("direct", [4.0], [100.0], reads=True), row("medforge", [5.0], [90.0], reads=True)]
    assert (report.share(slow[1], rows + slow), report.added(slow[1], rows + slow, "p50_ms")) == (0.9, 1.0)
    assert report.headline(rows + slow) == report.headline(slow + rows) == "gateway: ratio 3.20 over fastapi+httpx"


def test_a_ratio_needs_both(rows: list[Row]) -> None:
    assert report.headline(rows[:2]) == "gateway: no ratio, as fastapi+httpx was not measured"
    assert report.headline(rows[:1]) == "gateway: no ratio, as medforge and fastapi+httpx were not measured"
    rows[1].error = "wrk failed"
    assert report.headline(rows) == "gateway: no ratio, as medforge was not measured"


def test_the_table_has_a_line_for_each_and_its_error(rows: list[Row]) -> None:
    lines = report.table(rows, 16).splitlines()
    assert lines[0].split()[:5] == ["contender", "p50", "ms", "p99", "ms"]
    assert lines[3].split() == ["medforge", "3.00", "6.00", "2.00", "4.00", "800", "0.80", "30.0", "0.50", "–"]
    assert lines[5].split() == ["litellm", *["–"] * 9]
    assert lines[6] == "error: litellm: broke off"


def test_throughput_is_told_by_connections(rows: list[Row]) -> None:
    assert report.by_connections(rows, 32) == {}
    rows[1].levels = {4: [300.0, 500.0, 400.0], 64: [700.0]}
    rows[3].levels = {4: [10.0]}  # before it broke off
    assert report.by_connections(rows, 32) == {"medforge": {32: 800.0, 4: 400.0, 64: 700.0}}
    lines = report.table(rows, 32).splitlines()
    assert lines[7].split() == ["requests/s", "by", "connections", "4", "32", "64"]
    assert lines[9].split() == ["medforge", "400", "800", "700"]
    assert report.document(rows, {}, 32)["by_connections"] == report.by_connections(rows, 32)


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is installed, started or loaded: each repeat gives a contender's known figures. Returns the results."""
    per_second = {"direct": 1000.0, "medforge": 600.0, "fastapi+httpx": 200.0, "litellm": 20.0}

    def one(row: Row, launch: servers.Starter | None, bench: measure.Bench) -> None:
        assert (launch is None) == (row.contender == "direct")
        assert bench.body.stat().st_size > 200_000
        row.per_second.append(per_second[row.contender])

    monkeypatch.setattr(command, "measure", one)
    monkeypatch.setattr(load, "find_wrk", lambda: "wrk")
    monkeypatch.setattr(command, "versions", lambda python, packages: dict.fromkeys(packages, "1"))
    monkeypatch.setattr(command, "PEERS", {name: Made() for name in command.PEERS})
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results" / "gateway.json")
    return tmp_path / "results" / "gateway.json"


class Made:
    """An environment that is there."""

    def make(self, cache: Path) -> Path:
        return cache / "python"


def test_a_whole_run_writes_the_results(stood_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--cache", str(tmp_path), "--seconds", "5"]) == 0
    saved = json.loads(stood_in.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == saved["headline"] == "gateway: ratio 3.00 over fastapi+httpx"
    names = ["direct", "medforge", "fastapi+httpx", "litellm", "direct", "medforge"]
    assert [one["contender"] for one in saved["results"]] == names
    assert [one["reads"] for one in saved["results"]] == [False] * 4 + [True] * 2
    assert [len(one["per_second"]) for one in saved["results"]] == [3] * 6
    assert [one["share_of_direct"] for one in saved["results"]] == [1.0, 0.6, 0.2, 0.02, 1.0, 0.6]
    assert saved["work"]["seconds"] == 5


@pytest.mark.parametrize("partial_run", [["--quick"], ["--only", "litellm"]])
def test_a_partial_run_leaves_the_results(stood_in: Path, tmp_path: Path, partial_run: list[str]) -> None:
    command.main([*partial_run, "--cache", str(tmp_path)])
    assert not stood_in.exists()
    saved = json.loads((tmp_path / "gateway" / "partial.json").read_text())
    assert saved["results"][0]["contender"] == "direct"


@pytest.mark.usefixtures("stood_in")
def test_a_peer_that_cannot_be_installed_is_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def make(self, cache: Path) -> Path:
            raise ValueError("litellm cannot be installed")

    monkeypatch.setitem(command.PEERS, "litellm", Broken())
    assert command.main(["--quick", "--cache", str(tmp_path)]) == 1
    assert "error: litellm: litellm cannot be installed" in capsys.readouterr().out


@pytest.mark.usefixtures("stood_in")
@pytest.mark.parametrize("name", ["--seconds", "--connections", "--repeats"])
def test_work_that_cannot_be_done_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 0: at least 1"):
        command.main([name, "0", "--cache", str(tmp_path)])


def test_the_plain_proxy_gives_the_upstreams_answer(tmp_path: Path) -> None:
    body = load.payload(load.picture(64))
    with servers.running("upstream", servers.upstream, "", tmp_path / "upstream", body) as upstream:
        base = upstream.url.removesuffix(servers.CHAT) + "/v1"
        plain = partial(servers.plain, Path(sys.executable))
        with servers.running("plain", plain, base, tmp_path / "plain", body) as server:
            servers.check("plain", server, body)
            assert measure.processor_seconds(server.process.pid) > 0
            assert measure.memory(server.process.pid) > 10 << 20
    assert server.process.poll() is not None
    assert upstream.process.poll() is not None


def test_a_server_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    def broken(place: servers.Place) -> servers.Launch:
        return servers.Launch([sys.executable, "-c", "raise SystemExit('no such setting')"])

    with (
        pytest.raises(ValueError, match=r"broken ended with 1.*no such setting"),
        servers.running("broken", broken, "", tmp_path, b"{}"),
    ):
        pass


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")
def test_wrk_posts_the_body_and_its_figures_are_read(tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_bytes(load.payload(load.picture()))
    with servers.running("upstream", servers.upstream, "", tmp_path / "upstream", body.read_bytes()) as server:
        sent = load.send("wrk", server.url, body, {"X-Key": "1"}, 2, 1)
        assert sent.requests > 10
        assert 0 < sent.p50_ms <= sent.p99_ms
        with pytest.raises(ValueError, match="were answered with an error"):
            load.send("wrk", f"{server.url}/nothing", body, {}, 2, 1)


def test_the_upstream_that_reads_decodes_the_image() -> None:
    assert upstream.read(load.payload(load.picture(40))) == (40, 40)
    with pytest.raises(OSError, match=r"truncated|identify|broken"):
        upstream.read(load.payload(load.picture(40)[:-600]))
