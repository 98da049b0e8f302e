"""The bases of the images (bases.env): read, and pinned by digest with what asks registries on this machine.

`python -m images.bases`, or `make images-pin`, writes the digests; the tags stay in the lines, for people and renewal.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_name("bases.env")
NAMES = ("PYTHON_BASE", "CUDA_BUILD_BASE", "CUDA_RUNTIME_BASE")
_LINE = re.compile(r"(?P<name>[A-Z_]+)=(?P<reference>[^\s@]+)(?P<digest>@sha256:[0-9a-f]{64})?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LOGGED = re.compile(r'\bmsg="((?:[^"\\]|\\.)*)"')  # skopeo's own words in a line of its log
# what asks, and how: each prints the digest of the reference's manifest, of the list of them for several platforms
_ASK = {
    "skopeo": ("inspect", "--no-tags", "--format", "{{.Digest}}", "docker://{reference}"),
    "docker": ("buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", "{reference}"),
}
_SECONDS = 120


def read(path: Path = FILE) -> dict[str, str]:
    """The references by name, with their digests where they have them. Raises ValueError with the line's number."""
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(
                f"{path}:{number}: NAME=registry/repository:tag or …:tag@sha256:<64 hex digits> is expected"
            )
        if match["name"] not in NAMES or match["name"] in found:
            wrong = "is there twice" if match["name"] in found else f"is none of {', '.join(NAMES)}"
            raise ValueError(f"{path}:{number}: {match['name']} {wrong}")
        found[match["name"]] = match["reference"] + (match["digest"] or "")
    if missing := [name for name in NAMES if name not in found]:
        raise ValueError(f"{path}: {', '.join(missing)} is missing")
    return found


def chosen(variant: str, references: Mapping[str, str]) -> dict[str, str]:
    """The build arguments BUILD_BASE and RUNTIME_BASE of a variant (cpu or gpu)."""
    if variant == "gpu":
        return {"BUILD_BASE": references["CUDA_BUILD_BASE"], "RUNTIME_BASE": references["CUDA_RUNTIME_BASE"]}
    return {"BUILD_BASE": references["PYTHON_BASE"], "RUNTIME_BASE": references["PYTHON_BASE"]}


def require_digests(bases: Mapping[str, str]) -> None:
    """Raises ValueError if one of the references is a tag, which may be another image tomorrow."""
    if loose := sorted({reference for reference in bases.values() if "@" not in reference}):
        raise ValueError(f"a release needs bases by digest, and {', '.join(loose)} has none: run `make images-pin`")


def resolve(reference: str) -> str:
    """The digest of the reference's tag, as the registry has it now.

    Raises ValueError if nothing is installed that can ask, or if all that ask fail, with their words.
    """
    failures = []
    for program, arguments in _ASK.items():
        if shutil.which(program) is None:
            continue
        command = [program, *(argument.replace("{reference}", reference) for argument in arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603  a fixed list
        except subprocess.TimeoutExpired:
            failures.append(f"{program}: no answer in {_SECONDS} s")
            continue
        if done.returncode == 0 and _DIGEST.fullmatch(done.stdout.strip()):
            return done.stdout.strip()
        told = (done.stderr or done.stdout).strip().splitlines()
        logged = _LOGGED.search(told[0]) if told else None
        words = logged[1].replace('\\"', '"') if logged else told[0] if told else "no digest came"
        failures.append(f"{program}: {words}")
    if not failures:
        raise ValueError(f"{reference}: install {' or '.join(_ASK)} to ask its registry for the digest")
    why = "; ".join(failures)
    raise ValueError(f"{reference}: no digest is known ({why}); pin where its registry is reached, or name a mirror")


def pin(path: Path = FILE) -> dict[str, str]:
    """Write the digests of all tags into the file, whole or not at all; comments stay. Returns the references."""
    read(path)  # tells what is wrong before anything is asked
    lines = path.read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        if match := _LINE.fullmatch(line.strip()):
            lines[index] = f"{match['name']}={match['reference']}@{resolve(match['reference'])}"
    work = path.with_name(path.name + ".tmp")
    work.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(work, path)
    return read(path)


def main() -> int:
    """Pin. Returns 0, or 1 after one line that tells what is wrong; the file is then as it was."""
    try:
        for name, reference in pin().items():
            print(f"{name}={reference}")
    except (ValueError, OSError) as error:
        print(f"images-pin: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
