"""Build all images on a stand-in base and try each as a cluster would run it: `python -m images.check`.

Each container has a read-only root file system, no capabilities, no way to gain privileges, and user 10001. The steps
of the compiled pipeline run one after the other in the images that it names, against the embedded object store; the
predictor serves the release that they publish, and the gateway answers by it. Sizes go to `images/sizes.json`.
`make images-test` runs it, in the project's environment and as root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from images import bases, build, standin
from images.launcher import Launcher, Step

USER = "10001:10001"
SIZES = Path(__file__).with_name("sizes.json")
# what must not be in an image: importing it has to fail
ABSENT = {
    "data": ("torch", "transformers", "pip"),
    "train": ("pip",),
    "predictor": ("pip",),
    "gateway": ("torch", "transformers", "kserve", "pip"),
}
MODULES = {
    "data": ("kfp", "kfp.kubernetes", "matplotlib", "jinja2", "medforge.steps", "pipelines.kubeflow"),
    "train": ("torch", "transformers", "peft", "accelerate", "tensorboard", "medforge.train.launch"),
    "predictor": ("torch", "transformers", "kserve", "kserve_storage", "serving.predictor.kserving"),
    "gateway": ("serving.gateway.app", "psycopg", "redis", "libjpeg", "openjpeg"),
}
# a pipeline that takes seconds a step; what it learns does not matter, so the policy asks for figures only
CONFIG = {
    "name": "images",
    "data": {"source": "phantom", "phantom": {"images": 24, "size": 64}},
    "model": {"base": "tiny:qwen3-vl", "max_pixels": 4096, "max_length": 200, "tiny": {"steps": 8, "batch_size": 4}},
    "stages": [
        {"name": "align", "tune": ["vision_merger"], "steps": 4, "batch_size": 4, "evaluate_every": 2},
        {"name": "instruct", "tune": ["language_attention"], "steps": 4, "batch_size": 4, "evaluate_every": 2},
    ],
    "evaluate": {"batch_size": 4, "max_new_tokens": 4, "report_samples": 4},
    "policy": {"name": "any", "rules": [{"name": "measured", "metric": "exact_match", "bound": 0.0, "min_n": 1}]},
}
_READY_SECONDS = 180.0


class TrialError(Exception):
    """A trial went wrong; the message says what was expected and what came."""


@contextlib.contextmanager
def trial(name: str) -> Iterator[None]:
    """One line of the report: what was tried, and how long it took."""
    clock = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"  failed  {name}", flush=True)
        raise
    print(f"  ok      {name} ({time.monotonic() - clock:.1f} s)", flush=True)


def locked(image: str, command: Sequence[str], *options: str, detach: str = "") -> list[str]:
    """podman's command line for a container as the chart's security context has it; `detach` is its name then."""
    line = ["podman", "run", "--rm", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:mode=1777"]  # noqa: S108
    line += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "host"]
    line += ["--env", f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '1')}", *options]
    return [*line, *(("--detach", "--name", detach) if detach else ()), image, *command]


def run(image: str, *command: str, options: Sequence[str] = (), code: int = 0) -> str:
    """Run a command in a locked container. Returns what it printed; raises TrialError unless it ended with `code`."""
    done = subprocess.run(locked(image, command, *options), capture_output=True, text=True)  # noqa: S603  our own words
    if done.returncode != code:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise TrialError(f"{image}: {' '.join(command)[:200]} ended with {done.returncode} instead of {code}:\n{said}")
    return done.stdout


def settings(image: str, name: str) -> None:
    """The image's settings are the contract's: user, folder, path, no entry point, labels."""
    (found,) = json.loads(_podman("image", "inspect", image))
    config = found["Config"]
    wanted = {"User": USER, "WorkingDir": "/app", "Entrypoint": None}
    got = {key: config.get(key) or None for key in wanted}
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    wanted |= {"PYTHONPATH": "/app", "HOME": "/tmp"}  # noqa: S108  a volume of the pod
    got |= {key: environment.get(key) for key in ("PYTHONPATH", "HOME")}
    label = "org.opencontainers.image."
    wanted |= {"version": build.version(), "title": f"medforge-{name}"}
    got |= {key: config["Labels"].get(label + key) for key in ("version", "title")}
    if wanted != got or not environment["PATH"].startswith("/opt/venv/bin:"):
        raise TrialError(f"{image}: {got}, PATH {environment['PATH']}; expected {wanted}, PATH /opt/venv/bin:…")


def contents(image: str, name: str) -> None:
    """What has to be in it can be imported, what must not cannot, and nothing but /tmp can be written."""
    if "COMMAND" not in run(image, "medforge", "--help"):
        raise TrialError(f"{image}: `medforge --help` does not name its commands")
    run(image, "python", "-c", "\n".join(f"import {module}" for module in MODULES[name]))
    for module in ABSENT[name]:
        run(image, "python", "-c", f"import {module}", code=1)
    run(image, "sh", "-c", "touch /tmp/x && ! touch /app/x 2>/dev/null && ! touch /opt/venv/x 2>/dev/null")
    if (user := run(image, "sh", "-c", "id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status").split()) != [
        "10001", "CapEff:", "0000000000000000", "NoNewPrivs:", "1",
    ]:  # fmt: skip
        raise TrialError(f"{image}: runs as {user}")


def pipeline(images: Mapping[str, str], scratch: Path, store: Mapping[str, str]) -> str:
    """Run the compiled pipeline's steps in their images. Returns the digest of the release that they publish."""
    (scratch / "run.json").write_text(json.dumps(CONFIG), encoding="utf-8")  # JSON is YAML
    out = scratch / "retrain.yaml"
    line = [sys.executable, "-m", "pipelines.compile", "--config", str(scratch / "run.json"), "--out", str(out)]
    named = {"MEDFORGE_IMAGE_DATA": images["data"], "MEDFORGE_IMAGE_TRAIN": images["train"]}
    compiled = subprocess.run(line, env=os.environ | named, cwd=build.ROOT, capture_output=True, text=True)  # noqa: S603
    if compiled.returncode:
        raise TrialError(f"the pipeline does not compile: {compiled.stderr.strip()}")
    volume = scratch / "s3"
    shutil.rmtree(volume, ignore_errors=True)
    volume.mkdir()
    options = ["--volume", f"{volume}:/s3"]
    for name, value in store.items():
        options += ["--env", f"{name}={value}"]
    used = set()

    def step(step: Step) -> None:
        with trial(f"step {step.name} in {step.image}"):
            run(step.image, *step.command, options=options)
        used.add(step.image)

    import yaml

    with out.open(encoding="utf-8") as stream:
        spec = next(document for document in yaml.safe_load_all(stream) if "root" in document)
    outputs = Launcher(spec, volume, step).pipeline()
    if used != set(named.values()):
        raise TrialError(f"the steps ran in {sorted(used)}; data and train are expected")
    return str(outputs["publish"]["parameters"]["Output"])


@contextlib.contextmanager
def running(image: str, name: str, command: Sequence[str], *options: str) -> Iterator[None]:
    """A container in the background until the block ends, when SIGTERM has to end it in order."""
    subprocess.run(["podman", "rm", "--force", "--ignore", name], capture_output=True, check=True)  # noqa: S603,S607
    line = [word for word in locked(image, command, *options, detach=name) if word != "--rm"]
    started = subprocess.run(line, capture_output=True, text=True)  # noqa: S603  made by `locked`
    if started.returncode:
        raise TrialError(f"{image} does not start: {started.stderr.strip()}")
    try:
        yield
        _podman("stop", "--time", "30", name)
        code = _podman("inspect", "--format", "{{.State.ExitCode}}", name).strip()
        if code != "0":
            raise TrialError(f"{image}: ended with {code} after SIGTERM")
    except TrialError:
        logged = subprocess.run(["podman", "logs", name], capture_output=True, text=True)  # noqa: S603,S607
        print("\n".join((logged.stdout + logged.stderr).strip().splitlines()[-20:]), file=sys.stderr)
        raise
    finally:
        _podman("rm", "--force", name)


def serving(images: Mapping[str, str], release: str, scratch: Path, store: Mapping[str, str]) -> None:
    """The predictor serves the release from the object store, and the gateway answers by it."""
    port, front = free_port(), free_port()
    data = scratch / "data"
    data.mkdir()
    os.chown(data, *(int(number) for number in USER.split(":")))  # what fsGroup does for a volume
    place = f"s3://medforge/releases/{release}/"
    command = ["python", "-m", "serving.predictor", "--model-dir", place, "--release", release, "--allow-unsigned"]
    keys = {
        "AWS_ENDPOINT_URL": f"http://{store['MEDFORGE_S3_ENDPOINT']}",
        "AWS_ACCESS_KEY_ID": store["MEDFORGE_S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": store["MEDFORGE_S3_SECRET_KEY"],
        "AWS_DEFAULT_REGION": store.get("MEDFORGE_S3_REGION", "us-east-1"),
        "S3_VERIFY_SSL": "0",
    }
    upstream = f"http://127.0.0.1:{port}/openai/v1"
    about = {"PORT": str(front), "HOST": "127.0.0.1", "STABLE": upstream, "AUTHENTICATION": "false"}
    gateway = [f"--env=MEDFORGE_GATEWAY_{name}={value}" for name, value in about.items()]
    with running(images["gateway"], "medforge-images-gateway", [], f"--volume={data}:/data", *gateway):
        with trial("gateway answers /livez, and /readyz by 503 without a predictor"):
            wait(lambda: ask(f"http://127.0.0.1:{front}/livez")[0] == 200, 60)
            status, told = ask(f"http://127.0.0.1:{front}/readyz")
            if status != 503 or told["ready"]:
                raise TrialError(f"/readyz: {status} {told}")
        run(images["predictor"], "python", "-m", "serving.predictor", "--help")
        options = [f"--env={name}={value}" for name, value in keys.items()]
        line = [*command, "--http_port", str(port)]
        with running(images["predictor"], "medforge-images-predictor", line, *options):
            with trial("predictor loads the release and is ready"):
                wait(lambda: ask(f"http://127.0.0.1:{port}/v2/health/ready")[0] == 200, _READY_SECONDS)
            with trial("gateway is ready and answers a question by it"):
                wait(lambda: ask(f"http://127.0.0.1:{front}/readyz")[0] == 200, 60)
                body = {"model": "medforge", "max_tokens": 4, "messages": [{"role": "user", "content": "Is it well?"}]}
                status, told = ask(f"http://127.0.0.1:{front}/v1/chat/completions", body)
                if status != 200 or "content" not in told["choices"][0]["message"]:
                    raise TrialError(f"/v1/chat/completions: {status} {told}")


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of an answer; 0 where nothing listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310  loopback
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except HTTPError as error:
        return error.code, json.loads(error.read() or b"null")
    except (URLError, OSError):
        return 0, None


def wait(until: Callable[[], bool], seconds: float) -> None:
    """Ask again and again. Raises TrialError when `seconds` have passed."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise TrialError(f"not within {seconds:.0f} s")
        time.sleep(0.3)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def sizes(images: Mapping[str, str], base: str) -> dict[str, dict[str, float]]:
    """MB (10^6 bytes) of each image unpacked, and of what it adds to its base."""
    under = _bytes(base)
    return {
        name: {"total_mb": round(_bytes(image) / 1e6, 1), "over_base_mb": round((_bytes(image) - under) / 1e6, 1)}
        for name, image in images.items()
    }


def _bytes(image: str) -> int:
    return int(_podman("image", "inspect", "--format", "{{.Size}}", image))


def _podman(*arguments: str) -> str:
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True)  # noqa: S603,S607  our own words
    if done.returncode:
        raise TrialError(f"podman {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Build and try. Returns 0, or 1 after what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m images.check", description="Build the images and try them.")
    parser.add_argument("--scratch", type=Path, default=build.ROOT / ".medforge/images", help="(default %(default)s)")
    parser.add_argument("--no-build", action="store_true", help="try what was built before")
    arguments = parser.parse_args(argv)
    try:
        standin.require_tools()
        standin.configure(arguments.scratch.resolve())
        _check(arguments.scratch.resolve(), not arguments.no_build)
    except (TrialError, ValueError) as error:
        print(f"images-test: {error}", file=sys.stderr)
        return 1
    return 0


def _check(scratch: Path, fresh: bool) -> None:
    from medforge.embedded import serve

    references = bases.read()
    about = standin.make(references["PYTHON_BASE"], scratch)
    images = {name: build.tag_of("localhost/medforge", name, build.version(), "cpu") for name in build.NAMES}
    code, seconds = build.revision(), build.epoch(os.environ)
    options = [*standin.volumes(), "--isolation", "chroot", "--network", "host"]
    for name, image in images.items() if fresh else ():
        told = build.labels(name, references["PYTHON_BASE"], code, seconds)
        line = build.command("buildah", name, image, "cpu", references, told, options)
        with trial(f"build {image}"):
            build.build([word if word != f"TORCH_INDEX={build.CPU_WHEELS}" else "TORCH_INDEX=" for word in line])
    for name, image in images.items():
        with trial(f"{name}: settings, contents, locked file system"):
            settings(image, name)
            contents(image, name)
    with tempfile.TemporaryDirectory(prefix="medforge-", dir=scratch) as work, serve(Path(work)) as store:
        release = pipeline(images, Path(work), store)
        serving(images, release, Path(work), store)
    table = sizes(images, references["PYTHON_BASE"])
    measured = {"base": about, "unit": "10^6 bytes, unpacked", "images": table}
    SIZES.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(f"\n{'image':<12}{'MB':>9}{'over base':>12}   (base: {about})")
    for name, row in table.items():
        print(f"{name:<12}{row['total_mb']:>9.1f}{row['over_base_mb']:>12.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
