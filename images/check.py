"""Build all images on a stand-in base and try each as a cluster would run it: `python -m images.check`.

Each container has a read-only root file system, no capabilities, no way to gain privileges, and user 10001. The steps
of the compiled pipelines run one after the other in the images that they name, against the embedded object store, until
a release is published, approved and promoted; then everything that the chart starts is started by the chart's own
command, environment and files, and a question with an API key is answered by that release. Sizes go to
`images/sizes.json`. `make images-test` runs it, in the project's environment and as root.

All of it has process ids and mounts of its own (unshare(1)): however it ends, nothing goes on or stays mounted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from images import bases, build, manifests, standin
from images.containers import TrialError, identity, inspect, podman, run, running, sizes, trial
from images.launcher import Launcher, Step

USER = (10001, 10001)
SIZES = Path(__file__).with_name("sizes.json")
# what must not be in an image: importing it has to fail
ABSENT = {
    "data": ("torch", "transformers", "pip"),
    "train": ("pip",),
    "predictor": ("pip",),
    "gateway": ("torch", "transformers", "kserve", "pyarrow", "pip"),
}
MODULES = {
    "data": ("kfp.kubernetes", "matplotlib", "jinja2", "pyarrow.parquet", "medforge.steps", "pipelines.kubeflow"),
    "train": ("torch", "transformers", "peft", "accelerate", "tensorboard", "medforge.train.launch"),
    "predictor": ("torch", "transformers", "kserve", "kserve_storage", "serving.predictor.kserving"),
    "gateway": ("serving.gateway.app", "psycopg", "redis", "libjpeg", "openjpeg"),
}
# beside `medforge --help`: what people and pipelines start there
COMMANDS = {
    "data": (
        "medforge deploy --help", "medforge rollout status --help", "medforge rollout watch --help",
        "medforge rollout promote --help", "medforge rollout rollback --help", "python -m pipelines.kubeflow --help",
        "python -m pipelines.compile --pipeline release --out /tmp/release.yaml",
    ),
    "train": ("medforge train --help", "medforge merge --help", "medforge models --help"),
    "predictor": ("python -m serving.predictor --help",),
    "gateway": ("python -m serving.gateway --help", "medforge keys --help", "medforge audit --help"),
}  # fmt: skip
# neither a compiler, nor what pip keeps, nor tests or sources
_CLEAN = """
for program in cc gcc c++ g++ make; do if command -v $program; then exit 1; fi; done
find /opt /app /root /tmp -name .cache -o -name '*.whl' -o -path /app/tests -o -path /app/src | grep . && exit 1
touch /tmp/x && ! touch /app/x 2>/dev/null && ! touch /opt/venv/x 2>/dev/null
"""
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
_CACHE_HOURS = 168
_INSIDE = "MEDFORGE_IMAGES_INSIDE"


def settings(image: str, name: str) -> None:
    """The image's settings are the contract's: user, folder, path, no entry point, labels."""
    config = inspect(image)["Config"]
    wanted = {"User": ":".join(map(str, USER)), "WorkingDir": "/app", "Entrypoint": None}
    got = {key: config.get(key) or None for key in wanted}
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    wanted |= {"PYTHONPATH": "/app", "HOME": "/tmp"}  # noqa: S108  a volume of the pod
    got |= {key: environment.get(key) for key in ("PYTHONPATH", "HOME")}
    label = "org.opencontainers.image."
    wanted |= {"version": build.version(), "title": f"medforge-{name}"}
    got |= {key: config["Labels"].get(label + key) for key in ("version", "title")}
    if wanted != got or not environment["PATH"].startswith("/opt/venv/bin:"):
        raise TrialError(f"{image}: {got}, PATH {environment['PATH']}; expected {wanted}, PATH /opt/venv/bin:…")
    if not config["Labels"].get(label + "revision"):
        raise TrialError(f"{image}: no label {label}revision says of which commit it is")


def contents(image: str, name: str) -> None:
    """What has to be in it is there and starts, what must not be is not, and nothing but /tmp can be written."""
    if "COMMAND" not in run(image, "medforge", "--help"):
        raise TrialError(f"{image}: `medforge --help` does not name its commands")
    run(image, "env", "--unset=PYTHONPATH", "medforge", "--version")
    for command in COMMANDS[name]:
        run(image, *command.split())
    run(image, "python", "-c", "\n".join(f"import {module}" for module in MODULES[name]))
    for module in ABSENT[name]:
        run(image, "python", "-c", f"import {module}", code=1)
    run(image, "sh", "-c", _CLEAN)
    if (user := run(image, "sh", "-c", "id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status").split()) != [
        "10001", "CapEff:", "0000000000000000", "NoNewPrivs:", "1",
    ]:  # fmt: skip
        raise TrialError(f"{image}: runs as {user}")


def compiled(name: str, images: Mapping[str, str], scratch: Path) -> Mapping[str, Any]:
    """The pipeline's IR, by the project's own compiler, with these images."""
    import yaml

    (scratch / "run.json").write_text(json.dumps(CONFIG), encoding="utf-8")  # JSON is YAML
    out = scratch / f"{name}.yaml"
    line = [sys.executable, "-m", "pipelines.compile", "--pipeline", name, "--out", str(out)]
    line += ["--config", str(scratch / "run.json")]
    named = {"MEDFORGE_IMAGE_DATA": images["data"], "MEDFORGE_IMAGE_TRAIN": images["train"]}
    done = subprocess.run(line, env=os.environ | named, cwd=build.ROOT, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise TrialError(f"the pipeline {name} does not compile: {done.stderr.strip()}")
    with out.open(encoding="utf-8") as stream:
        return dict(next(document for document in yaml.safe_load_all(stream) if "root" in document))


def pipelines(images: Mapping[str, str], scratch: Path, store: Mapping[str, str]) -> tuple[str, str]:
    """Run the pipelines' steps in their images. Returns the digest of the release, and the key of who approved it."""
    keys, volume = scratch / "keys", scratch / "s3"
    for folder in (keys, volume):
        folder.mkdir()
        os.chown(folder, *USER)
    options = [f"--volume={volume}:/s3", *(f"--env={name}={value}" for name, value in store.items())]
    used = set()

    def runner(*more: str) -> Callable[[Step], None]:
        def step(step: Step) -> None:
            with trial(f"step {step.name} in {step.image}"):
                run(step.image, *step.command, options=[*options, *more])
            used.add(step.image)

        return step

    outputs = Launcher(compiled("retrain", images, scratch), volume, runner()).pipeline()
    if used != {images["data"], images["train"]}:
        raise TrialError(f"the steps ran in {sorted(used)}; data and train are expected")
    release = str(outputs["publish"]["parameters"]["Output"])
    with trial("medforge signing-key and approve in the data image"):
        reviewer = [*options, f"--volume={keys}:/keys"]
        run(images["data"], "medforge", "signing-key", "/keys/trial", options=reviewer)
        words = ["medforge", "approve", release, "--key", "/keys/trial", "--reviewer", "Trial"]
        run(images["data"], *words, options=reviewer)
    key = (keys / "trial.pub").read_text(encoding="utf-8")
    approved = runner(f"--env=MEDFORGE_TRUSTED_KEYS={key}")
    outputs = Launcher(compiled("release", images, scratch), volume, approved).pipeline(release=release)
    if "promote" not in outputs:
        raise TrialError(f"the release pipeline ran {', '.join(outputs)}; promote is expected among them")
    return release, key


def chart(images: Mapping[str, str], release: str, key: str, scratch: Path, store: Mapping[str, str]) -> None:
    """Start what the chart starts; the predictor serves the release, and the gateway answers by it."""
    port, front, closed = free_port(), free_port(), f"http://127.0.0.1:{free_port()}"
    run_settings = CONFIG | {"data": {"source": "s3://medforge/sources/trial/"}}
    values = {
        "images": {"registry": "localhost"},
        "gateway": {"environment": "development"},
        "predictor": {"gpu": {"count": 0}},
        "networkPolicy": {"enabled": False},
        "objectStore": {"endpoint": store["MEDFORGE_S3_ENDPOINT"], "secure": False},
        "stable": {"release": release},
        "reviewers": {"keys": {"trial.pub": key}},
        "tests": {"apiKeySecret": "trial"},
        "pipelines": {"schedule": {"enabled": True, "endpoint": closed, "run": run_settings}},
    }
    secrets = {
        "secret-key": "a secret of the trial, long enough",
        "AWS_ACCESS_KEY_ID": store["MEDFORGE_S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": store["MEDFORGE_S3_SECRET_KEY"],
        "api-key": "",  # made below, by the gateway
    }
    objects = manifests.render(values, name="medforge", namespace="medforge")
    manifests.lead_to(objects, f"http://127.0.0.1:{port}/openai/v1")
    found = {work.name: work for work in manifests.workloads(objects, secrets, scratch / "volumes", USER)}
    left = {name: work for name, work in found.items() if work.image in images.values()}

    def take(name: str, image: str) -> manifests.Workload:
        if name not in left or left[name].image != images[image]:
            raise TrialError(f"the chart has no {name} with {images[image]}: {', '.join(left)}")
        return left.pop(name)

    with trial("Job store-check of the chart"):
        job = take("Job medforge-store-check", "data")
        run(job.image, *job.command, options=job.options)
    with trial("Job schedule of the chart: it compiles, and says that Kubeflow is not there"):
        job = take("Job medforge-schedule", "data")
        if closed not in (told := run(job.image, *job.command, options=job.options, code=1)):
            raise TrialError(f"{job.name}: {told}")
    model = scratch / "model"
    with trial("medforge verify-release in the data image"):
        model.mkdir()
        os.chown(model, *USER)
        (model.parent / "trial.pub").write_text(key, encoding="utf-8")
        options = [f"--env={name}={value}" for name, value in store.items()]
        options += [f"--volume={model}:/models", f"--volume={model.parent}/trial.pub:/keys/trial.pub:ro"]
        words = ["medforge", "verify-release", release, "--trusted", "/keys/trial.pub", "--out", "/models/release"]
        run(images["data"], *words, options=options)

    gateway = take("Deployment medforge-gateway", "gateway")
    asking = take("Pod medforge-test", "gateway")
    predictor = take("ServingRuntime medforge-predictor", "predictor")
    if left:
        raise TrialError(f"{', '.join(left)}: the chart starts it, and nothing here tries it")
    (served,) = [o["spec"]["predictor"]["model"] for o in objects if o["kind"] == "InferenceService"]
    line = [word if not word.startswith("--http_port=") else f"--http_port={port}" for word in predictor.command]
    mounted = [*predictor.options, f"--volume={model}/release:/mnt/models:ro"]  # as KServe's storage initializer does
    options = [*gateway.options, f"--env=MEDFORGE_GATEWAY_PORT={front}"]
    url = f"http://127.0.0.1:{front}"
    with running(gateway.image, "gateway", gateway.command, *options):
        with trial("gateway answers /livez, and /readyz by 503 without a predictor"):
            wait(lambda: ask(f"{url}/livez")[0] == 200, 60)
            expect(f"{url}/readyz", 503)
        with running(predictor.image, "predictor", [*line, *served["args"]], *mounted):
            with trial("predictor verifies and loads the release, and is ready"):
                wait(lambda: ask(f"http://127.0.0.1:{port}/v2/health/ready")[0] == 200, _READY_SECONDS)
            with trial("gateway refuses a question without a key, and answers one with it"):
                wait(lambda: ask(f"{url}/readyz")[0] == 200, 60)
                made = podman("exec", "gateway", "medforge", "keys", "add", "trial", "--scopes", "diagnose,chat")
                (secret,) = [word for word in made.split() if word.startswith("mf_")]
                body = {"model": "medforge", "max_tokens": 4, "messages": [{"role": "user", "content": "Is it well?"}]}
                expect(f"{url}/v1/chat/completions", 401, body)
                told = expect(f"{url}/v1/chat/completions", 200, body, secret)
                if "content" not in told["choices"][0]["message"]:
                    raise TrialError(f"/v1/chat/completions: {told}")
            with trial("Pod of `helm test`"):
                more = [f"--env=MEDFORGE_URL={url}", f"--env=MEDFORGE_API_KEY={secret}"]
                run(asking.image, *asking.command, options=[*asking.options, *more])
            with trial("the audit log is whole"):
                podman("exec", "gateway", "medforge", "audit", "verify", "/data/audit")


def expect(url: str, status: int, body: Any = None, key: str = "") -> Any:
    """The JSON of an answer. Raises TrialError unless it has this status."""
    got, told = ask(url, body, key)
    if got != status:
        raise TrialError(f"{url}: {got} {told}; {status} is expected")
    return told


def ask(url: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    """Status and JSON of an answer; 0 where nothing listens."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data, headers)  # noqa: S310  loopback
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


def make(images: Mapping[str, str], references: Mapping[str, str]) -> None:
    """Build the images; those that had their names before are removed, and layers of builds of long ago."""
    code, seconds = build.revision(), build.epoch(os.environ)
    options = [*standin.volumes(), "--isolation", "chroot", "--network", "host"]
    for name, image in images.items():
        told = build.labels(name, references["PYTHON_BASE"], code, seconds)
        line = build.command("buildah", name, image, "cpu", references, told, options)
        before = identity(image)
        with trial(f"build {image}"):
            build.build([word if word != f"TORCH_INDEX={build.CPU_WHEELS}" else "TORCH_INDEX=" for word in line])
        if before and before != identity(image):
            podman("rmi", before)
    podman("image", "prune", "--force", "--filter", f"until={_CACHE_HOURS}h")


def main(argv: Sequence[str] | None = None) -> int:
    """Build and try. Returns 0, 1 after what is wrong, or 130."""
    parser = argparse.ArgumentParser(prog="python -m images.check", description="Build the images and try them.")
    parser.add_argument("--scratch", type=Path, default=build.ROOT / ".medforge/images", help="(default %(default)s)")
    parser.add_argument("--no-build", action="store_true", help="try what was built before")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    try:
        standin.require_tools()
        if _INSIDE not in os.environ:
            return _apart(given)
        with standin.storage(arguments.scratch.resolve()) as work:
            _check(work, not arguments.no_build)
    except (TrialError, ValueError, OSError) as error:
        print(f"images-test: {error}", file=sys.stderr)
        return 1
    return 0


def _apart(given: Sequence[str]) -> int:
    """Run this again in namespaces of its own; they end with it, and it ends with this process."""
    from medforge.lifetime import die_with_parent

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    line = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    line += [sys.executable, "-m", "images.check", *given]
    with subprocess.Popen(  # noqa: S603  our own words
        line, env=os.environ | {_INSIDE: "1"}, preexec_fn=die_with_parent(), start_new_session=True
    ) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            print("images-test: interrupted; finished layers are kept, and the same command goes on", file=sys.stderr)
            return 130
        finally:
            child.kill()


def _check(work: Path, fresh: bool) -> None:
    from medforge.embedded import serve

    references = bases.read()
    images = {name: build.tag_of("localhost/medforge", name, build.version(), "cpu") for name in build.NAMES}
    standin.require_space(work)
    about = standin.make(references["PYTHON_BASE"], work)
    if fresh:
        make(images, references)
    for name, image in images.items():
        with trial(f"{name}: settings, contents, locked file system"):
            settings(image, name)
            contents(image, name)
    with serve(work) as store:
        release, key = pipelines(images, work, store)
        chart(images, release, key, work, store)
    table = sizes(images, references["PYTHON_BASE"])
    measured = {"base": about, "unit": "10^6 bytes, unpacked", "images": table}
    SIZES.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(f"\n{'image':<12}{'MB':>9}{'over base':>12}   layers (base: {about})")
    for name, row in table.items():
        largest = ", ".join(f"{made} {size}" for made, size in list(row["layers_mb"].items())[:3])
        print(f"{name:<12}{row['total_mb']:>9.1f}{row['over_base_mb']:>12.1f}   {largest}")


if __name__ == "__main__":
    raise SystemExit(main())
