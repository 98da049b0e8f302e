"""`make serve` as a user meets it: a store, an approval, a page, a key, answers; and what it says if one is missing."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pydicom.data
import pytest

from medforge.audit import verify_files
from medforge.cli import main
from medforge.embedded import serve
from medforge.release.sign import approve, new_key
from medforge.storage import Store
from tests.conftest import png
from tests.integration.serving.releases import NOW, publish_tiny
from tests.integration.serving.test_predictor import free_port

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[3]
# an untrained model's answers are not sure of anything
LENIENT = {"MEDFORGE_GATEWAY_MATCH_THRESHOLD": "0"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a release, which the key in `reviewers` has approved."""
    root = tmp_path_factory.mktemp("local")
    new_key(root / "reviewers" / "me")
    with serve(root) as environment:
        digest = publish_tiny(environment, "medforge", "candidate", root / "parts")
        approve(Store.from_environment(environment), "medforge", digest, root / "reviewers" / "me", "R", "approve", "",
                NOW)  # fmt: skip
    (root / "digest").write_text(digest)
    return root


def command(root: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "serving.local", "--root", str(root), *words]


def clean(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEDFORGE_", "AWS_"))}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


@contextmanager
def served(root: Path, *words: str) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """What `make serve` starts: the gateway's address, the key, and the process."""
    port = free_port()
    process = subprocess.Popen(
        command(root, "--port", str(port), *words),
        cwd=PROJECT,
        env=clean(**LENIENT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        key = next((line.split()[1] for line in said if line.startswith("key:")), "")
        assert key, "".join(said)
        yield f"http://127.0.0.1:{port}", key, process
    finally:
        process.terminate()
        process.wait(60)


def test_a_release_is_served_and_asked_in_every_way(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = (root / "digest").read_text()
    image = tmp_path / "scan.png"
    image.write_bytes(png(width=96, height=96))
    with served(root) as (url, key, process):
        # the terminal
        words = ["--url", url, "--root", str(root), "--json"]
        assert main(["ask", str(image), "Which organ is shown?", *words]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["release"]["digest"] == digest
        assert told["decision"] in ("answered", "abstained") and "Not for diagnostic use" in told["disclaimer"]
        # curl, as it was printed
        asked = ["curl", "-sf", "-H", f"Authorization: Bearer {key}", "-F", f"image=@{root}/serve/example.png"]
        done = subprocess.run([*asked, "-F", "question=Which modality?", f"{url}/v1/diagnose"], capture_output=True)
        assert done.returncode == 0 and json.loads(done.stdout)["release"]["digest"] == digest
        # a DICOM file
        dicom = pydicom.data.get_testdata_file("MR_small.dcm", download=False)
        assert main(["ask", str(dicom), "lesion", "--locate", *words]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["images"][0]["format"], told["images"][0]["width"]) == ("dicom", 64)
        # OpenAI's client
        client = openai.OpenAI(
            base_url=f"{url}/v1", api_key=key, http_client=openai.DefaultHttpxClient(trust_env=False)
        )
        assert [model.id for model in client.models.list()] == ["medforge"]
        raw = client.chat.completions.with_raw_response.create(
            model="medforge", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
        assert raw.headers["x-medforge-release"] == digest
        # the page, and what is served
        with urllib.request.urlopen(f"{url}/") as page:
            assert b"MedForge" in page.read()
        request = urllib.request.Request(f"{url}/v1/releases/current", headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["heads"] == ["match", "region"]
        # the key is its owner's alone, and the audit log is whole
        assert stat.S_IMODE((root / "gateway" / "key").stat().st_mode) == 0o600
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # store, predictor, gateway
    assert sum(chain.rows for chain in verify_files(root / "gateway" / "audit", None)) >= 4
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert process.returncode == 143
    with served(root) as (_, again, _):
        assert again == key  # a second start keeps it


def test_a_part_that_ends_ends_all(root: Path) -> None:
    with served(root) as (_, _, process):
        family = psutil.Process(process.pid).children(recursive=True)
        (predictor,) = [child for child in family if "serving.predictor" in child.cmdline()]
        os.kill(predictor.pid, signal.SIGKILL)
        assert process.wait(60) == 1
        assert process.stdout is not None and "predictor ended with -9" in process.stdout.read()
        assert not psutil.wait_procs(family, timeout=10)[1]


def test_killed_outright_it_leaves_nothing_behind(root: Path) -> None:
    with served(root) as (_, _, process):
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert not psutil.wait_procs(family, timeout=20)[1]


def refused(root: Path, *words: str) -> str:
    done = subprocess.run(
        command(root, "--port", str(free_port()), *words), cwd=PROJECT, env=clean(), capture_output=True, text=True,
        timeout=90,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_is_missing_is_told_with_its_mend(root: Path, tmp_path: Path) -> None:
    assert "there is no store at" in refused(tmp_path) and "make pipeline-run" in refused(tmp_path)
    new_key(tmp_path / "stranger")
    told = refused(root, "--trusted", str(tmp_path / "stranger.pub"))
    assert re.search(r"no release in bucket 'medforge' is approved by a key in .*\n +medforge signing-key", told)
    assert "make serve CANDIDATE=1" in told
    assert "no release or channel in bucket 'medforge' is named 'abcdef'" in refused(root, "--release", "abcdef")


def test_a_release_that_was_changed_is_not_served(root: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    digest = (root / "digest").read_text()
    weights = copy / "store" / "medforge" / "releases" / digest / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    told = refused(copy)
    assert "predictor ended with 1" in told and "model.safetensors" in told


def test_a_port_that_is_taken_is_told_at_once(root: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            command(root, "--port", str(taken.getsockname()[1])), cwd=PROJECT, env=clean(), capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1 and "is taken; choose another: make serve PORT=" in done.stderr
