"""Build the images with docker, podman or buildah, whichever works here: `python -m images.build`, or `make images`.

Tags are <repository>/<name>:<version>, with -gpu behind for that variant. With --push, `dist/images.json` says the
reference by digest of each, which a cluster is to be given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from images import bases

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("data", "train", "predictor", "gateway")
WITH_TORCH = ("train", "predictor")
VARIANTS = ("cpu", "gpu")
ENGINES = ("docker", "podman", "buildah")
SOURCE = "https://github.com/medforge/medforge"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # PyPI's wheels of torch are those for CUDA
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def engine(wanted: str = "") -> str:
    """The first engine that is installed and answers, or `wanted`.

    Raises ValueError with what is wrong with each.
    """
    if wanted and wanted not in ENGINES:
        raise ValueError(f"engine: {wanted!r} is none of {', '.join(ENGINES)}")
    reasons = []
    for name in [wanted] if wanted else ENGINES:
        if shutil.which(name) is None:
            reasons.append(f"{name} is not installed")
            continue
        asked = subprocess.run([name, "info"], capture_output=True, text=True)  # noqa: S603  one of ENGINES
        told = (asked.stderr.strip() or asked.stdout.strip()).splitlines()
        # docker's client answers without its engine, and says so on its last line
        if asked.returncode == 0 and not any("Cannot connect" in line for line in told):
            return name
        reasons.append(f"{name} does not answer ({told[-1].strip() if told else f'ended with {asked.returncode}'})")
    raise ValueError(f"images are built by docker, podman or buildah: {'; '.join(reasons)}")


def version() -> str:
    """The version of the code, as the wheel will have it."""
    text = (ROOT / "src/medforge/__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    assert match is not None
    return match[1]


def revision() -> str:
    """The commit that is built, "-dirty" behind it where the files differ; "unknown" outside of a checkout."""
    commit = _git("rev-parse", "HEAD")
    return "unknown" if commit is None else commit + ("-dirty" if _git("status", "--porcelain") else "")


def epoch(environment: Mapping[str, str]) -> int:
    """Seconds since 1970 that the image says it was made at: SOURCE_DATE_EPOCH, the commit's time, or 0.

    Never now: the same sources are to give the same image. Raises ValueError if the variable is no whole number.
    """
    text = environment.get("SOURCE_DATE_EPOCH") or _git("log", "-1", "--format=%ct") or "0"
    if not text.isdecimal():
        raise ValueError(f"SOURCE_DATE_EPOCH: {text!r} is no whole number of seconds")
    return int(text)


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)  # noqa: S603,S607  our words
    return done.stdout.strip() if done.returncode == 0 else None


def labels(name: str, base: str, code: str, seconds: int) -> dict[str, str]:
    """OCI's annotations of the image `name` whose commit is `code`."""
    prefix = "org.opencontainers.image."
    reference, _, digest = base.partition("@")
    told = {
        "title": f"medforge-{name}",
        "description": f"MedForge: {name}",
        "version": version(),
        "revision": code,
        "source": SOURCE,
        "licenses": "Apache-2.0",
        "created": datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "base.name": reference,
    } | ({"base.digest": digest} if digest else {})
    return {prefix + key: value for key, value in told.items()}


def command(
    program: str,
    name: str,
    tag: str,
    variant: str,
    references: Mapping[str, str],
    told: Mapping[str, str],
    options: Sequence[str] = (),
) -> list[str]:
    """The engine's command line for one image; `options` are the engine's own, after ours."""
    arguments = bases.chosen(variant if name in WITH_TORCH else "cpu", references)
    if name in WITH_TORCH:
        arguments |= {"VARIANT": variant, "TORCH_INDEX": CPU_WHEELS if variant == "cpu" else ""}
    line = [program, "build", "--file", f"images/{name}.Dockerfile", "--tag", tag]
    if program != "docker":
        line.append("--layers")  # buildah keeps them only if told
    for key, value in arguments.items():
        line += ["--build-arg", f"{key}={value}"]
    for key, value in told.items():
        line += ["--label", f"{key}={value}"]
    return [*line, *options, "."]


def tag_of(repository: str, name: str, tag: str, variant: str) -> str:
    """The reference of an image; only those with torch have variants."""
    return f"{repository}/{name}:{tag}{'-gpu' if variant == 'gpu' and name in WITH_TORCH else ''}"


def build(line: Sequence[str]) -> None:
    """Run the engine; what it tells goes to the terminal. Raises ValueError if it fails."""
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}  # for RUN --mount
    done = subprocess.run(line, cwd=ROOT, env=environment)  # noqa: S603  made by `command`
    if done.returncode:
        named = line[line.index("--file") + 1]
        raise ValueError(f"{named}: {line[0]} ended with {done.returncode}; its words are above")


def push(program: str, reference: str) -> str:
    """Push the image; returns its reference by digest. Raises ValueError if the registry does not take it."""
    with tempfile.TemporaryDirectory(prefix="medforge-") as work:
        file = Path(work) / "digest"
        noted = [] if program == "docker" else ["--digestfile", str(file)]
        if subprocess.run([program, "push", *noted, reference]).returncode:  # noqa: S603  one of ENGINES
            raise ValueError(f"{reference}: {program} could not push it; log in, or give --repository")
        if program == "docker":
            shown = ["docker", "image", "inspect", "--format", "{{json .RepoDigests}}", reference]
            known = json.loads(subprocess.run(shown, check=True, capture_output=True, text=True).stdout)  # noqa: S603
            repository = reference.rpartition(":")[0]
            (digest,) = [entry.rpartition("@")[2] for entry in known if entry.rpartition("@")[0] == repository]
        else:
            digest = file.read_text(encoding="utf-8").strip()
    assert _DIGEST.fullmatch(digest), digest
    return f"{reference.rpartition(':')[0]}@{digest}"


def main(argv: Sequence[str] | None = None) -> int:
    """Build as the command line says. Returns 0, or 1 after one line that tells what is wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    arguments = _parser().parse_args(own)
    try:
        _run(arguments, options)
    except (ValueError, OSError) as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("images: interrupted; finished layers are kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m images.build",
        description="Build the images.",
        epilog="What follows -- goes to the engine, such as: -- --platform linux/arm64",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"which ones, of {', '.join(NAMES)} (default: all)")
    add("--repository", default="medforge", help="registry and folder (default medforge)")
    add("--tag", default=version(), help="(default %(default)s, the code's version)")
    add("--variant", default="cpu", help=f"of train and predictor, one of {', '.join(VARIANTS)} (default cpu)")
    add("--engine", default="", help=f"one of {', '.join(ENGINES)} (default: the first that works)")
    add("--release", action="store_true", help="refuse bases without a digest, and changes that are not committed")
    add("--push", action="store_true", help="push each image, and write the references by digest to dist/images.json")
    return parser


def _run(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    if unknown := [name for name in arguments.names if name not in NAMES]:
        raise ValueError(f"{', '.join(unknown)}: no such image; there are {', '.join(NAMES)}")
    if arguments.variant not in VARIANTS:
        raise ValueError(f"variant: {arguments.variant!r} is none of {', '.join(VARIANTS)}")
    references, code = bases.read(), revision()
    names = [name for name in NAMES if name in arguments.names or not arguments.names]
    if arguments.release:
        for name in names:
            bases.require_digests(bases.chosen(arguments.variant if name in WITH_TORCH else "cpu", references))
        if code.endswith("-dirty") or code == "unknown":
            raise ValueError("a release is built from a commit: commit or put away what `git status` shows")
    program = engine(arguments.engine)
    made = {}
    for name in names:
        reference = tag_of(arguments.repository, name, arguments.tag, arguments.variant)
        base = bases.chosen(arguments.variant if name in WITH_TORCH else "cpu", references)["RUNTIME_BASE"]
        told = labels(name, base, code, epoch(os.environ))
        print(f"images: {reference} with {program}", flush=True)
        build(command(program, name, reference, arguments.variant, references, told, options))
        if arguments.push:
            made[name] = push(program, reference)
    if made:
        out = ROOT / "dist/images.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        print("\n".join(made.values()))


if __name__ == "__main__":
    raise SystemExit(main())
