"""What stands in for a registry's Python image where none is reached: Debian from its archive, imported as the base.

It is for trying the images, never for a release. Needs root, Debian's buildah, podman, runc and debootstrap.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

TOOLS = ("buildah", "podman", "runc", "debootstrap", "unshare")
_GIGABYTES = 14  # twice what all of them take, since the layers before stay until the new ones are there
_INCLUDED = "ca-certificates,python3,python3-pip,python3-venv"
_AUTHORITIES = Path("etc/ssl/certs/ca-certificates.crt")
_STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "{0}/graph"\nrunroot = "{0}/run"\n'
# runc: crun refuses hybrid control groups; the limits are ones that a container without privileges may have; networks
# are the machine's own, and its configuration of others does not matter
_CONTAINERS = """[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{0}/run/libpod"
[network]
network_config_dir = "{0}/run/networks"
"""


def require_tools() -> None:
    """Raises ValueError that says what to install, or that root is needed."""
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        raise ValueError(f"{', '.join(missing)} is missing: apt-get install buildah podman runc debootstrap netavark")
    if os.geteuid() != 0:
        raise ValueError("a base can be imported by root only; on a machine with a registry use `make images`")


def require_space(folder: Path) -> None:
    """Raises ValueError if the disk is too full for builds, which would end in the middle of a layer."""
    if (free := shutil.disk_usage(folder).free) < _GIGABYTES * 10**9:
        raise ValueError(
            f"{folder}: {free / 1e9:.1f} GB are free and {_GIGABYTES} are needed; make room, or give another --scratch"
        )


@contextlib.contextmanager
def storage(scratch: Path) -> Iterator[Path]:
    """Let the engines that this process starts keep everything in `scratch`, alone. Yields an empty folder in it.

    To the engines each time is the first after the machine's start: no process and no mount of an earlier one, which
    may have been killed, is there any more, and what it left in their books is put away. Raises ValueError if another
    is at work there.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{scratch}: another run is there; wait for its end, or give another --scratch") from None
        work = scratch / "work"
        for folder in (work, scratch / "run"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for name, text in (("storage.conf", _STORAGE), ("containers.conf", _CONTAINERS)):
            (scratch / name).write_text(text.replace("{0}", str(scratch)), encoding="utf-8")
        os.environ["CONTAINERS_STORAGE_CONF"] = str(scratch / "storage.conf")
        os.environ["CONTAINERS_CONF"] = str(scratch / "containers.conf")
        os.environ["TMPDIR"] = str(work)  # an import is unpacked there, and /tmp may be small
        _run("podman", "rm", "--all", "--force", "--time", "0")
        _run("buildah", "rm", "--all")  # builds that were killed
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def make(reference: str, scratch: Path) -> str:
    """Import Debian as `reference`, unless that has been done; returns what is told of it in reports.

    The machine's certificates and its pip's settings are put in, so that the Dockerfiles need know nothing of them.
    """
    told = "a debootstrap of Debian bookworm"
    if subprocess.run(["podman", "image", "exists", reference]).returncode == 0:  # noqa: S603,S607  our words
        return told
    root = scratch / "rootfs"
    _run("debootstrap", "--variant=minbase", f"--include={_INCLUDED}", "bookworm", str(root))
    shutil.copyfile(Path("/") / _AUTHORITIES, root / _AUTHORITIES)
    (root / "etc/pip.conf").write_text(_pip_settings(), encoding="utf-8")
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()  # Python's own image has none
    for name, target in (("python", "python3"), ("python3", "python3"), ("pip", "pip3")):
        (root / "usr/local/bin" / name).symlink_to(f"/usr/bin/{target}")
    for leftover in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*")):
        leftover.unlink()
    archive = scratch / "rootfs.tar"
    _run("tar", "-C", str(root), "-cf", str(archive), ".")
    settings = [f"PIP_CERT=/{_AUTHORITIES}", f"SSL_CERT_FILE=/{_AUTHORITIES}", f"REQUESTS_CA_BUNDLE=/{_AUTHORITIES}"]
    changes = [word for setting in settings for word in ("--change", f"ENV {setting}")]
    _run("podman", "import", "--quiet", *changes, str(archive), reference)
    archive.unlink()
    shutil.rmtree(root)
    return told


def volumes() -> list[str]:
    """The engine's options that show a build the folders of wheels and indexes that this machine's pip reads."""
    words = _pip_settings().replace("=", " ").split()
    paths = [Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///"))]
    roots = sorted({path.parent if path.name == "simple" else path for path in paths if path.is_dir()})
    return [word for path in roots for word in ("--volume", f"{path}:{path}:ro")]


def _pip_settings() -> str:
    """pip.conf of this machine: its indexes and folders of wheels, and nothing else of it."""
    kept = configparser.ConfigParser(interpolation=None)
    kept["global"] = {}
    for path in (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf"):
        found = configparser.ConfigParser(interpolation=None)
        found.read(path)
        for name in ("index-url", "extra-index-url", "find-links"):
            if found.has_option("global", name):
                kept["global"][name] = found["global"][name]
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in kept["global"].items())


def _run(*line: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True)  # noqa: S603  made here
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(f"{line[0]} ended with {done.returncode}: {told[-1] if told else 'it said nothing'}")
