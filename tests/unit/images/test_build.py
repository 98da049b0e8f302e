"""Building: the choice of the engine, its command line, bases and their digests."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from images import bases, build, standin
from medforge import __version__

DIGEST = "sha256:" + "0123456789abcdef" * 4
PINNED = {name: f"registry.example/{name.lower()}:1@{DIGEST}" for name in bases.NAMES}
LOOSE = {name: f"registry.example/{name.lower()}:1" for name in bases.NAMES}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, script: str) -> None:
    """An executable that notes its arguments in <name>.calls."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.calls\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def file(folder: Path, references: dict[str, str]) -> Path:
    path = folder / "bases.env"
    path.write_text("# a comment\n" + "".join(f"{name}={value}\n" for name, value in references.items()))
    return path


class TestEngine:
    def test_the_first_that_answers_is_taken(self, programs: Path) -> None:
        program(programs, "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
        program(programs, "podman", "exit 125")
        program(programs, "buildah", "echo {}")
        assert build.engine() == "buildah"

    def test_a_docker_client_that_ends_well_without_its_engine_does_not_count(self, programs: Path) -> None:
        program(programs, "docker", "echo Client:; echo 'Cannot connect to the Docker daemon at unix:///x' >&2")
        with pytest.raises(ValueError, match=r"docker does not answer \(Cannot connect"):
            build.engine()

    def test_none_is_told_with_the_reason_of_each(self, programs: Path) -> None:
        program(programs, "podman", "echo 'no subuid ranges' >&2; exit 125")
        with pytest.raises(ValueError) as caught:
            build.engine()
        told = str(caught.value)
        assert "docker is not installed; podman does not answer (no subuid ranges); buildah is not installed" in told

    def test_the_one_that_is_wanted_is_not_replaced(self, programs: Path) -> None:
        program(programs, "buildah", "exit 0")
        with pytest.raises(ValueError, match=r"docker is not installed$"):
            build.engine("docker")
        with pytest.raises(ValueError, match="'kaniko' is none of docker, podman, buildah"):
            build.engine("kaniko")


class TestCommand:
    def test_bases_variant_and_labels_reach_the_engine(self) -> None:
        line = build.command("buildah", "train", "r/train:1-gpu", "gpu", PINNED, {"a": "b c"}, ["--no-cache"])
        assert line[:2] == ["buildah", "build"]
        assert line[-2:] == ["--no-cache", "."]
        given = [line[index + 1] for index, word in enumerate(line) if word == "--build-arg"]
        assert given == [
            f"BUILD_BASE={PINNED['CUDA_BUILD_BASE']}",
            f"RUNTIME_BASE={PINNED['CUDA_RUNTIME_BASE']}",
            "VARIANT=gpu",
            "TORCH_INDEX=",
        ]
        assert line[line.index("--label") + 1] == "a=b c"

    @pytest.mark.parametrize("name", ["data", "gateway"])
    def test_images_without_torch_have_no_variants(self, name: str) -> None:
        line = build.command("docker", name, "x", "gpu", PINNED, {})
        given = [line[index + 1] for index, word in enumerate(line) if word == "--build-arg"]
        assert given == [f"{kind}_BASE={PINNED['PYTHON_BASE']}" for kind in ("BUILD", "RUNTIME")]
        assert build.tag_of("medforge", name, "1", "gpu") == f"medforge/{name}:1"

    def test_the_cpu_variant_does_not_bring_cuda(self) -> None:
        assert f"TORCH_INDEX={build.CPU_WHEELS}" in build.command("docker", "predictor", "x", "cpu", PINNED, {})

    def test_labels_are_ocis_and_say_the_version_and_the_commits_time(self) -> None:
        told = build.labels("data", PINNED["PYTHON_BASE"], "c0ffee", 86_400)
        prefix = "org.opencontainers.image."
        assert all(key.startswith(prefix) for key in told)
        assert told[prefix + "version"] == __version__ == build.version()
        assert (told[prefix + "revision"], told[prefix + "created"]) == ("c0ffee", "1970-01-02T00:00:00Z")
        assert told[prefix + "base.digest"] == DIGEST
        assert prefix + "base.digest" not in build.labels("data", LOOSE["PYTHON_BASE"], "c0ffee", 0)

    def test_the_time_is_never_now(self) -> None:
        assert build.epoch({"SOURCE_DATE_EPOCH": "17"}) == 17
        assert build.epoch({}) == build.epoch({})
        with pytest.raises(ValueError, match="SOURCE_DATE_EPOCH: 'today'"):
            build.epoch({"SOURCE_DATE_EPOCH": "today"})


class TestMain:
    @pytest.fixture
    def engine(self, programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """podman that does nothing but note; pushes leave a digest."""
        script = f'for word; do [ "$last" = --digestfile ] && echo {DIGEST} > "$word"; last=$word; done; exit 0'
        program(programs, "podman", script)
        monkeypatch.setattr(build, "ROOT", tmp_path)
        (tmp_path / "src/medforge").mkdir(parents=True)
        (tmp_path / "src/medforge/__init__.py").write_text('__version__ = "9.9"\n')
        monkeypatch.setattr(bases, "read", lambda: PINNED)
        return programs / "podman.calls"

    def test_the_named_images_are_built_in_order_and_options_pass(self, engine: Path) -> None:
        assert build.main(["gateway", "data", "--", "--no-cache"]) == 0
        calls = [line for line in engine.read_text().splitlines() if line.startswith("build")]
        assert ["data" in calls[0], "gateway" in calls[1], len(calls)] == [True, True, 2]
        assert all(line.endswith("--no-cache .") for line in calls)

    def test_pushed_images_are_told_by_digest(self, engine: Path, tmp_path: Path) -> None:
        assert build.main(["data", "--push", "--repository", "registry.example:5000/med"]) == 0
        written = json.loads((tmp_path / "dist/images.json").read_text())
        assert written == {"data": f"registry.example:5000/med/data@{DIGEST}"}

    def test_a_failing_build_ends_it(self, engine: Path, programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        program(programs, "podman", '[ "$1" = info ]')
        assert build.main(["data", "gateway"]) == 1
        assert "images/data.Dockerfile: podman ended with 1" in capsys.readouterr().err
        assert "gateway" not in engine.read_text()

    def test_an_unknown_image_or_variant_is_refused(self, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert build.main(["model"]) == 1
        assert "model: no such image; there are data, train, predictor, gateway" in capsys.readouterr().err
        assert build.main(["--variant", "npu"]) == 1
        assert capsys.readouterr().err == "images: variant: 'npu' is none of cpu, gpu\n"
        assert not engine.exists()

    def test_a_release_refuses_bases_by_tag(
        self, engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(bases, "read", lambda: PINNED | {"CUDA_RUNTIME_BASE": "nvidia/cuda:13"})
        monkeypatch.setattr(build, "revision", lambda: "c0ffee")
        assert build.main(["--release"]) == 0, "the CPU variant does not use it"
        assert build.main(["--release", "--variant", "gpu"]) == 1
        assert "bases by digest, and nvidia/cuda:13 has none: run `make images-pin`" in capsys.readouterr().err

    def test_a_release_refuses_what_is_not_committed(
        self, engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(build, "revision", lambda: "c0ffee-dirty")
        assert build.main(["--release"]) == 1
        assert "built from a commit" in capsys.readouterr().err


class TestBases:
    def test_the_projects_file_is_sound(self) -> None:
        assert set(bases.read()) == set(bases.NAMES)

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ("PYTHON_BASE = python:3", ":5: NAME=registry/repository:tag"),
            ("PYTHON_BASE=python:3@sha256:beef", ":5: NAME=registry/repository:tag"),
            ("PYTHON_BASE=python:3", ":5: PYTHON_BASE is there twice"),
            ("RUBY_BASE=ruby:3", ":5: RUBY_BASE is none of"),
        ],
    )
    def test_a_mistake_is_told_with_its_line(self, tmp_path: Path, line: str, told: str) -> None:
        path = file(tmp_path, LOOSE)
        path.write_text(path.read_text() + line)
        with pytest.raises(ValueError, match=told):
            bases.read(path)

    def test_a_missing_base_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="CUDA_BUILD_BASE is missing"):
            bases.read(file(tmp_path, {k: v for k, v in LOOSE.items() if k != "CUDA_BUILD_BASE"}))

    def test_pinning_adds_digests_keeps_tags_and_renews(self, tmp_path: Path, programs: Path) -> None:
        program(programs, "skopeo", f"echo {DIGEST}")
        path = file(tmp_path, LOOSE | {"PYTHON_BASE": LOOSE["PYTHON_BASE"] + "@sha256:" + "f" * 64})
        assert bases.pin(path) == {name: f"{value}@{DIGEST}" for name, value in LOOSE.items()}
        assert path.read_text().startswith("# a comment\n")
        asked = (programs / "skopeo.calls").read_text()
        assert "docker://registry.example/python_base:1\n" in asked

    def test_what_cannot_be_resolved_leaves_the_file_as_it_was(self, tmp_path: Path, programs: Path) -> None:
        path = file(tmp_path, LOOSE)
        before = path.read_text()
        with pytest.raises(ValueError, match="install skopeo or docker"):
            bases.pin(path)
        program(
            programs,
            "skopeo",
            """case $* in *cuda_build*) echo 'time="x" level=fatal msg="manifest unknown"' >&2; exit 1;; esac\necho """
            + DIGEST,
        )
        program(programs, "docker", "echo not-a-digest")
        with pytest.raises(
            ValueError, match=r"cuda_build_base:1: no digest is known \(skopeo: manifest unknown; docker: not-a-d"
        ):
            bases.pin(path)
        assert path.read_text() == before
        assert [entry.name for entry in tmp_path.iterdir() if entry.name != "bin"] == ["bases.env"]


class TestStandIn:
    def test_missing_tools_are_named_with_what_to_install(self, programs: Path) -> None:
        with pytest.raises(ValueError, match="buildah, podman, runc, debootstrap, unshare is missing: apt-get install"):
            standin.require_tools()

    def test_pips_local_folders_are_shown_to_builds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / ".config/pip").mkdir(parents=True)
        (tmp_path / "wheels").mkdir()
        (tmp_path / "index/simple").mkdir(parents=True)
        text = f"[global]\nfind-links = {tmp_path}/wheels\nextra-index-url = file://{tmp_path}/index/simple https://x.example/s\n"
        (tmp_path / ".config/pip/pip.conf").write_text(text + "[install]\nuser = yes\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        mounted = standin.volumes()[1::2]
        assert {f"{tmp_path}/{name}:{tmp_path}/{name}:ro" for name in ("wheels", "index")} <= set(mounted)


def test_nothing_beyond_pythons_own_library_is_imported() -> None:
    """`make images` is to work before `make setup`."""
    code = "import sys; import images.build, images.bases; print(*{n.partition('.')[0] for n in sys.modules})"
    line = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(build.ROOT)!r}); {code}"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ)
    foreign = (
        set(done.stdout.split()) - sys.stdlib_module_names - {"images", "__main__", "_distutils_hack", "sitecustomize"}
    )
    assert not {name for name in foreign if not name.startswith("__editable__")}, foreign
