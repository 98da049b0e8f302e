"""The Dockerfiles against what the chart, Kubeflow and pyproject.toml expect of them."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from images.build import NAMES, WITH_TORCH

ROOT = Path(__file__).resolve().parents[3]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PYPROJECT["optional-dependencies"].items()}
INSTRUCTION = re.compile(r"([A-Z]+)\s+(.*)", re.DOTALL)


def instructions(name: str) -> list[tuple[str, str]]:
    """The file's instructions in their order, continued lines joined and comments left out."""
    lines = (ROOT / f"images/{name}.Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    matches = [INSTRUCTION.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    assert all(matches), f"{name}: a line is no instruction"
    return [(match[1], " ".join(match[2].split())) for match in matches if match]


def final_stage(name: str) -> list[tuple[str, str]]:
    """The instructions of the stage that becomes the image."""
    found = instructions(name)
    last = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[last:]


def requirements(name: str) -> list[str]:
    """What the file asks pip for."""
    runs = [words for word, words in instructions(name) if word == "RUN" and "venv.sh libraries" in words]
    assert len(runs) == 1
    words = shlex.split(runs[0].replace(";", " ; "))
    known = {*(canonicalize_name(r.name) for lines in EXTRAS.values() for r in lines), "liger-kernel"}
    return [word for word in words if word.startswith(".[") or word == "." or canonicalize_name(word) in known]


def test_there_is_a_file_for_each_image_and_no_other() -> None:
    assert {path.stem for path in (ROOT / "images").glob("*.Dockerfile")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestRules:
    def test_bases_are_arguments_without_a_value_in_the_file(self, name: str) -> None:
        """bases.env alone says what they are."""
        found = instructions(name)
        stages = [words for word, words in found if word == "FROM"]
        assert stages == ["${BUILD_BASE} AS libraries", "libraries AS code", "${RUNTIME_BASE}"]
        assert found[:2] == [("ARG", "BUILD_BASE"), ("ARG", "RUNTIME_BASE")]

    def test_nothing_hides_the_command_that_kubeflow_gives(self, name: str) -> None:
        assert not [word for word, _ in instructions(name) if word in ("ENTRYPOINT", "HEALTHCHECK", "SHELL", "VOLUME")]

    def test_user_and_folder_are_the_contracts(self, name: str) -> None:
        stage = final_stage(name)
        assert [words for word, words in stage if word == "USER"] == ["10001:10001"]
        assert [words for word, words in stage if word == "WORKDIR"] == ["/app"]
        after = [word for word, _ in stage[stage.index(("USER", "10001:10001")) + 1 :]]
        assert set(after) <= {"CMD"}, "nothing is to run or be copied as that user"
        environment = dict(word.split("=", 1) for key, words in stage if key == "ENV" for word in words.split())
        assert environment["PATH"] == "/opt/venv/bin:$PATH"
        assert (environment["PYTHONPATH"], environment["HOME"]) == ("/app", "/tmp")

    def test_what_is_copied_is_there_and_in_the_build_context(self, name: str) -> None:
        sources = [
            source
            for word, words in instructions(name)
            if word == "COPY" and "--from" not in words
            for source in words.split()[:-1]
        ]
        mounts = [
            match
            for word, words in instructions(name)
            if word == "RUN"
            for match in re.findall(r"source=([^,]+)", words)
        ]
        rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
        allowed = [rule[1:] for rule in rules if rule.startswith("!")]
        for source in {*sources, *mounts}:
            assert (ROOT / source).exists(), source
            assert any(source == rule or source.startswith(f"{rule}/") for rule in allowed), f"{source}: .dockerignore"
        refused = [rule for rule in rules if not rule.startswith(("!", "#"))]
        assert "*" in refused
        assert any(fnmatch.fnmatch("src/x/__pycache__", rule) for rule in refused)

    def test_requirements_are_ones_that_pyproject_has(self, name: str) -> None:
        """Otherwise they would come in a version that nobody has tried."""
        found = requirements(name)
        extras = {extra for word in found for extra in re.findall(r"[a-z]+", word.partition("[")[2])}
        assert extras <= EXTRAS.keys()
        assert [word for word in found if word.startswith(".")], "the library's own requirements"
        constrained = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        for word in (word for word in found if not word.startswith(".") and word != "liger-kernel"):
            assert re.search(rf"^{re.escape(word)}==", constrained, re.MULTILINE), f"{word}: not in constraints.txt"

    def test_torch_is_where_models_are(self, name: str) -> None:
        extras = {extra for word in requirements(name) for extra in re.findall(r"[a-z]+", word.partition("[")[2])}
        has = any(r.name == "torch" for extra in extras for r in EXTRAS[extra])
        assert has == (name in WITH_TORCH)
        arguments = {words.partition("=")[0] for word, words in instructions(name) if word == "ARG"}
        assert ({"VARIANT", "TORCH_INDEX"} <= arguments) == (name in WITH_TORCH)


def test_servers_start_by_the_command_that_the_chart_names() -> None:
    for name in ("predictor", "gateway"):
        assert ("CMD", f'["python", "-m", "serving.{name}"]') in final_stage(name)
        assert (ROOT / "serving" / name / "__main__.py").is_file()


def test_the_chart_and_the_pipelines_run_them_as_their_user() -> None:
    from pipelines.cluster import ClusterConfig

    texts = [
        path.read_text(encoding="utf-8")
        for ending in ("yaml", "tpl")
        for path in (ROOT / "charts/medforge/templates").rglob(f"*.{ending}")
    ]
    users = [user for text in texts for user in re.findall(r"(?:runAsUser|runAsGroup|fsGroup): *(\S+)", text)]
    assert set(users) == {"10001"}
    assert ClusterConfig.model_fields["user"].default == 10001
    started = {name for text in texts for name in re.findall(r"command: \[python, -m, serving\.(\w+)\]", text)}
    assert started == {"gateway", "predictor"}


def test_the_chart_names_them() -> None:
    values = yaml.safe_load((ROOT / "charts/medforge/values.yaml").read_text(encoding="utf-8"))["images"]
    assert {name: values[name]["repository"] for name in NAMES} == {name: f"medforge/{name}" for name in NAMES}


def test_the_gateways_settings_are_ones_that_it_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from serving.gateway.settings import PREFIX, load

    monkeypatch.chdir(tmp_path)  # no .env
    for word, words in final_stage("gateway"):
        for variable in words.split() if word == "ENV" else ():
            if variable.startswith(PREFIX):
                monkeypatch.setenv(*variable.split("=", 1))
    settings = load()  # an unknown one raises
    assert (settings.host, str(settings.data_dir)) == ("0.0.0.0", "/data")


@pytest.mark.parametrize("script", ["venv.sh", "runtime.sh"])
def test_an_unknown_variant_is_refused_before_anything_is_done(script: str, tmp_path: Path) -> None:
    line = ["sh", str(ROOT / "images" / script), "libraries"]
    environment = {"PATH": "/usr/bin:/bin", "VARIANT": "npu"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "VARIANT: npu is neither cpu nor gpu\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("program", "files"), [("hadolint", "*.Dockerfile"), ("shellcheck", "*.sh")])
def test_linters_find_nothing(program: str, files: str) -> None:
    found = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([found, *sorted((ROOT / "images").glob(files))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_the_code_leaves_the_layer_of_the_libraries(name: str) -> None:
    """What the large layer is made from: the version is in `__init__.py`, and the rest is not of every commit."""
    found = instructions(name)
    stage = found[: found.index(("FROM", "libraries AS code"))]
    copied = [source for word, words in stage if word == "COPY" for source in words.split()[:-1]]
    settled = {"LICENSE", "constraints.txt", "images/venv.sh", "pyproject.toml", "src/medforge/__init__.py"}
    assert set(copied) == settled
    assert [words for word, words in final_stage(name) if word == "COPY"][:2] == [
        "--from=libraries /opt/venv /opt/venv",
        "--from=code /build/app /app",
    ]
