"""The predictor as a process: a signed release from a folder and from an S3 server, asked by the clients in use."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from medforge.embedded import serve
from medforge.release.sign import approve, new_key
from medforge.storage import Store
from tests.integration.serving.releases import NOW, publish_tiny
from tests.unit.models.examples import picture

ROOT = Path(__file__).resolve().parents[3]
QUESTION = "Is there a lesion in this image?"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An embedded S3 server; its environment, and its folder as `root`."""
    root = tmp_path_factory.mktemp("store")
    with serve(root) as environment:
        yield {**environment, "root": str(root)}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key of a reviewer, and of a stranger."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("reviewer", "stranger"):
        new_key(folder / name)
    return folder


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory, store: dict[str, str], keys: Path) -> str:
    """A release of an untrained tiny model with heads, published and approved."""
    made = publish_tiny(store, "med", "champion", tmp_path_factory.mktemp("parts"))
    approve(Store.from_environment(store), "med", made, keys / "reviewer", "R", "approve", "", NOW)
    return made


@pytest.fixture(scope="module")
def folder(store: dict[str, str], digest: str) -> Path:
    """The release's folder in the store."""
    return Path(store["root"]) / "store" / "med" / "releases" / digest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(*words: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [sys.executable, "-m", "serving.predictor", *words], environment


@contextmanager
def predictor(*words: str, log: Path, env: dict[str, str] | None = None) -> Iterator[tuple[str, Any]]:
    """A predictor that is ready: its address and its process."""
    port = free_port()
    arguments, environment = command("--http_port", str(port), *words)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment | (env or {}), stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/v2/health/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield address, process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "predictor.log"


@pytest.fixture(scope="module")
def address(folder: Path, keys: Path, log: Path) -> Iterator[str]:
    words = ("--model-dir", str(folder), "--trusted", str(keys / "reviewer.pub"), "--max-new-tokens", "2000")
    with predictor(*words, "--timeout", "60", "--max-batch", "4", log=log) as (found, _):
        yield found


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{address}/openai/v1", api_key="none", max_retries=0) as made:
        yield made


def image(seed: int = 0) -> str:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def messages(seed: int = 0, question: str = QUESTION) -> Any:
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image(seed)}"}}
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


def metrics(address: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    rows = (line.rpartition(" ") for line in text.splitlines() if line.startswith("medforge_predictor_"))
    return {name: float(value) for name, _, value in rows}


def test_openais_client_is_answered(client: Any, digest: str) -> None:
    (model,) = client.models.list().data
    assert model.id == "medforge" and model.medforge["release"] == digest
    assert model.medforge["version"] == "unit 0.1.0" and model.medforge["heads"] == ["region", "match"]
    extra = {"medforge": {"region": True, "match": True, "claim": "yes"}}
    response = client.chat.completions.with_raw_response.create(
        model="medforge", messages=messages(), max_tokens=8, logprobs=True, top_logprobs=2, extra_body=extra
    )
    assert response.headers["x-medforge-release"] == digest and response.headers["x-medforge-model"] == "medforge"
    answer = response.parse()
    assert answer.usage.completion_tokens <= 8 and answer.usage.prompt_tokens > 9
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    told = answer.model_extra["medforge"]
    assert told["release"] == digest and 0 <= told["match"] <= 1
    x1, y1, x2, y2 = told["region"]
    assert 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1

    stream = client.chat.completions.create(
        model="medforge", messages=messages(), max_tokens=8, stream=True, stream_options={"include_usage": True},
        extra_body=extra,
    )  # fmt: skip
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    assert chunks[-1].model_extra["medforge"]["match"] == pytest.approx(told["match"], abs=1e-4)


def test_openais_client_understands_the_errors(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="medforge", messages=messages(), n=2)
    assert refused.value.code == "unsupported" and refused.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=messages())


def test_tokens_come_one_by_one_and_a_client_that_leaves_stops_the_model(client: Any, address: str) -> None:
    before = metrics(address)
    stream = client.chat.completions.create(
        model="medforge", messages=messages(), max_tokens=2000, temperature=1.0, seed=1, stream=True
    )
    times = []
    for number, _ in enumerate(stream):
        times.append(time.monotonic())
        if number == 4:
            break
    stream.close()
    assert times[-1] > times[0]
    deadline = time.monotonic() + 10
    while metrics(address)["medforge_predictor_cancelled_total"] == before["medforge_predictor_cancelled_total"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client.chat.completions.create(model="medforge", messages=messages(), max_tokens=1)
    after = metrics(address)
    assert after["medforge_predictor_requests_total"] == before["medforge_predictor_requests_total"] + 1


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/openai/v1/chat/completions", {"messages": messages(), "max_tokens": 2000, "temperature": 1.0}),
        ("/v1/models/medforge:predict", {"instances": [{"image": image(), "question": "x"}] * 8}),
    ],
)
def test_a_client_that_leaves_before_a_whole_answer_stops_the_model(address: str, path: str, document: Any) -> None:
    data = json.dumps(document).encode()
    host, port = address.removeprefix("http://").split(":")
    before = metrics(address)["medforge_predictor_cancelled_total"]
    for _ in range(8):  # an answer that is drawn may end before its client leaves
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + data)
            time.sleep(0.3)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if metrics(address)["medforge_predictor_cancelled_total"] > before:
                return
            time.sleep(0.05)
    pytest.fail("no request was cancelled")


def test_kserves_client_is_answered(address: str, digest: str) -> None:
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    question = {"image": image(), "question": QUESTION}

    async def ask() -> None:
        first = InferenceRESTClient(RESTConfig(protocol="v1"))
        headers: dict[str, str] = {}
        told = await first.infer(address, {"instances": [question]}, "medforge", response_headers=headers)
        (row,) = told["predictions"]
        assert headers["x-medforge-release"] == digest
        second = InferenceRESTClient(RESTConfig(protocol="v2"))
        assert await second.is_server_live(address) and await second.is_server_ready(address)
        assert await second.is_model_ready(address, "medforge")
        inputs = [InferInput(name, [1], "BYTES", [question[name]]) for name in ("image", "question")]
        response = await second.infer(address, InferRequest("medforge", inputs), "medforge")
        columns = {output.name: output for output in response.outputs}
        assert columns["answer"].data == [row["answer"]]
        assert columns["region"].as_numpy().shape == (1, 4)
        assert columns["region"].as_numpy()[0].tolist() == pytest.approx(row["region"], abs=1e-4)
        await first.close()
        await second.close()

    asyncio.run(ask())
    # what its client does not read
    tensors = [{"name": name, "shape": [1], "datatype": "BYTES", "data": [question[name]]} for name in question]
    status, _, told = post(address, "/v2/models/medforge/infer", json.dumps({"inputs": tensors}).encode())
    assert (status, json.loads(told)["model_version"]) == (200, digest[:12])


def post(
    address: str, path: str, data: bytes, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    kind = {"content-type": "application/octet-stream" if headers else "application/json"}
    request = urllib.request.Request(f"{address}{path}", data, kind | (headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.mark.parametrize("length", ["whole", "soon", "5"])
def test_binary_tensors_hold_text(address: str, log: Path, length: str) -> None:
    def ask(data: bytes) -> tuple[int, bytes]:
        columns = {
            name: struct.pack("<I", len(value)) + value for name, value in (("image", data), ("question", b"what"))
        }
        described = [
            {"name": name, "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
            for name, raw in columns.items()
        ]
        head = json.dumps({"inputs": described}).encode()
        told = str(len(head)) if length == "whole" else length
        body = head + b"".join(columns.values())
        status, _, text = post(address, "/v2/models/medforge/infer", body, {"inference-header-content-length": told})
        return status, text

    status, text = ask(image().encode())
    assert status == (200 if length == "whole" else 400), text
    status, text = ask(base64.b64decode(image()))
    assert status == 400 and b"base64" in text and b"PNG" not in text
    assert "PNG" not in log.read_text()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/models/medforge:predict", b"{}", 400),
        ("/v1/models/medforge:predict", b"{", 400),
        ("/v1/models/medforge:predict", b'{"instances": [{"image": "AAAA", "question": "Jane Doe"}]}', 400),
        ("/v1/models/other:predict", b'{"instances": []}', 404),
        ("/v2/models/medforge/infer", b'{"inputs": [{"name": "Jane Doe"}]}', 422),
        ("/v2/repository/models/medforge/unload", b"", 404),
        ("/openai/v1/chat/completions", b'{"messages": [{"role": "user", "content": "Jane Doe <image>"}]}', 400),
        ("/openai/v1/embeddings", b"{}", 404),
    ],
)
def test_bad_requests_are_refused_by_all_routes_and_logged_without_their_text(
    address: str, log: Path, digest: str, path: str, body: bytes, status: int
) -> None:
    found, headers, told = post(address, path, body)
    assert found == status, told
    assert headers["x-medforge-release"] == digest
    assert json.loads(told)
    assert "Jane" not in log.read_text()


def test_the_metrics_tell_what_is_served_and_done(address: str, digest: str) -> None:
    found = metrics(address)
    (release,) = [name for name in found if "release_info" in name]
    assert digest in release and 'status="approved"' in release and 'version="unit 0.1.0"' in release
    names = {name.partition("{")[0] for name in found}
    for name in ("queue_length", "batch_size_count", "request_seconds_count", "first_token_seconds_count"):
        assert f"medforge_predictor_{name}" in names
    assert found['medforge_predictor_tokens_total{kind="out"}'] > 0


def test_a_release_comes_from_an_s3_server_and_what_is_in_flight_finishes(
    store: dict[str, str], digest: str, keys: Path, tmp_path: Path
) -> None:
    environment = {
        "AWS_ENDPOINT_URL": f"http://{store['MEDFORGE_S3_ENDPOINT']}".replace("http://http://", "http://"),
        "AWS_ACCESS_KEY_ID": store["MEDFORGE_S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": store["MEDFORGE_S3_SECRET_KEY"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    words = ["--model-dir", f"s3://med/releases/{digest}", "--trusted", str(keys / "reviewer.pub")]
    words += ["--model-name", "eyes", "--timeout", "30", "--max-batch", "2", "--queue", "2"]
    log = tmp_path / "log"
    with predictor(*words, log=log, env=environment) as (address, process):
        import openai

        client = openai.OpenAI(base_url=f"{address}/openai/v1", api_key="none", max_retries=0)
        assert client.models.list().data[0].id == "eyes"
        # ten times what it holds: answered, or refused with a time to come back
        body = json.dumps({"messages": messages(), "max_tokens": 20}).encode()
        with ThreadPoolExecutor(40) as clients:
            told = list(clients.map(lambda _: post(address, "/openai/v1/chat/completions", body), range(80)))
        assert {status for status, _, _ in told} == {200, 429}
        assert all(int(headers["retry-after"]) >= 1 for status, headers, _ in told if status == 429)
        assert len({json.loads(text)["choices"][0]["message"]["content"] for code, _, text in told if code == 200}) == 1
        stream = client.chat.completions.create(
            model="eyes", messages=messages(), max_tokens=300, temperature=1.0, seed=3, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].usage is not None  # to its very end
        assert process.wait(30) == 0, log.read_text()


def ended(*words: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    arguments, environment = command("--http_port", str(free_port()), *words)
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment | (env or {}), capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("weights", "corrupted or changed"),
        ("extra", "does not name them"),
        ("signature", "a signature does not hold"),
        ("unsigned", "nobody has approved it"),
        ("stranger", "keys that are not trusted"),
        ("digest", "is not of release"),
    ],
)
def test_it_does_not_start_with_what_was_not_approved(
    folder: Path, keys: Path, tmp_path: Path, damage: str, told: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    words = ["--model-dir", str(copy), "--trusted", str(keys / "reviewer.pub")]
    (signature,) = (copy / "signatures").iterdir()
    if damage == "weights":
        path = copy / "model" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "extra":
        (copy / "model" / "sitecustomize.py").write_text("")
    elif damage == "signature":
        signature.write_text(signature.read_text().replace('"comment": ""', '"comment": "fine"'))
    elif damage == "unsigned":
        signature.unlink()
    elif damage == "stranger":
        words[-1] = str(keys / "stranger.pub")
    else:
        words += ["--release", "0" * 64]
    status, line = ended(*words)
    assert status == 1 and told in line
    assert line.startswith("python -m serving.predictor: ")


def test_it_does_not_start_without_a_store(keys: Path) -> None:
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_ACCESS_KEY_ID": "abc",
                   "AWS_SECRET_ACCESS_KEY": "abcdefgh", "AWS_MAX_ATTEMPTS": "1"}  # fmt: skip
    words = ("--model-dir", f"s3://med/releases/{'0' * 64}", "--trusted", str(keys / "reviewer.pub"))
    status, line = ended(*words, env=environment)
    assert status == 1 and "cannot be downloaded" in line and "AWS_ENDPOINT_URL" in line
    assert "abcdefgh" not in line
