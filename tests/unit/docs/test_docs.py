"""The documents stay true: commands, options, targets, values, variables, files, tests and links in them exist."""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from medforge.cli import parser

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "benchmarks|charts|components|docs|images|pipelines|serving|src|tests"
GATEWAY = "MEDFORGE_GATEWAY_"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(text: str) -> Iterator[str]:
    """The lines of code blocks, fenced or indented by four, joined where they go on; and what stands in backticks."""
    fenced, lines = False, []
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or re.match(r" {4,}\S", line):
            lines.append(line)
    yield from re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    prose = re.sub(r"(?ms)^\s*```.*?^\s*```|^ {4,}\S.*?$", "", text)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def words_of(line: str) -> list[str]:
    """A command's words, without a comment; the plain pieces where the quotes do not fit."""
    try:
        return shlex.split(line.strip().removeprefix("$ "), comments=True)
    except ValueError:
        return line.split()


def commands(path: Path, program: str) -> Iterator[list[str]]:
    """The words behind `program`, wherever a command begins: at the start, after a pipe, `&&`, `--` or variables."""
    for line in code(path.read_text()):
        words = words_of(line)
        for at, word in enumerate(words):
            before = words[:at]
            begins = (
                not before
                or before[-1] in ("|", "&&", "||", ";", "--", "run", "nice")
                or all(re.fullmatch(r"\w+=\S*|sudo|env", earlier) for earlier in before)
            )
            if begins and (word == program or word.endswith(f"/bin/{program}")):
                rest = words[at + 1 :]
                end = next((i for i, word in enumerate(rest) if word in ("|", "&&", "||", ";", ">")), len(rest))
                yield rest[:end]


@cache
def targets() -> frozenset[str]:
    return frozenset(re.findall(r"(?m)^([a-z0-9][a-z0-9-]*):", (ROOT / "Makefile").read_text()))


@cache
def values() -> Any:
    return yaml.safe_load((ROOT / "charts/medforge/values.yaml").read_text())


@pytest.fixture(params=DOCUMENTS, ids=name_of)
def document(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def test_targets_of_make_exist(document: Path) -> None:
    named = {word for words in commands(document, "make") for word in words if re.fullmatch(r"[a-z][a-z0-9-]*", word)}
    assert named <= targets(), sorted(named - targets())


def wrong(top: argparse.ArgumentParser, words: list[str]) -> str:
    """What of a command line of `medforge` does not exist; "" if all does. Placeholders are let pass."""
    at = top
    for word in words:
        groups = [action for action in at._actions if isinstance(action, argparse._SubParsersAction)]
        if word.startswith("--"):
            option = word.partition("=")[0]
            if option != "--" and option not in at._option_string_actions:
                return f"{at.prog} has no {option}"
        elif groups and not word.startswith("-"):
            if any(mark in word for mark in "|…<[."):  # a choice or a gap, for readers
                return ""
            if word not in groups[0].choices:
                return f"{at.prog} has no {word}"
            at = groups[0].choices[word]
    return ""


def test_commands_of_medforge_exist(document: Path) -> None:
    top = parser()
    problems = {problem for words in commands(document, "medforge") if (problem := wrong(top, words))}
    assert not problems, sorted(problems)


def test_a_wrong_command_would_be_found() -> None:
    top = parser()
    assert wrong(top, ["aprove", "x"]) == "medforge has no aprove"
    assert wrong(top, ["audit", "verify", "x", "--heads", "y"]) == "medforge audit verify has no --heads"
    assert wrong(top, ["approve", "x", "--key", "f", "--reviewer", "R"]) == ""
    text = (
        "Text `make nonsense`.\n\n    A=b medforge keys addd x \\\n        --scope y\n\n```\nmake test | tee log\n```\n"
    )
    assert list(code(text)) == ["    A=b medforge keys addd x --scope y", "make test | tee log", "make nonsense"]


def test_modules_that_are_run_exist_with_their_options(document: Path) -> None:
    for words in commands(document, "python"):
        if words[:1] != ["-m"] or words[1].split(".")[0] not in ("serving", "pipelines", "medforge", "benchmarks"):
            continue
        place = ROOT / ("src" if words[1].startswith("medforge") else "") / words[1].replace(".", "/")
        found = [file for file in (place.with_suffix(".py"), place / "__main__.py") if file.is_file()]
        assert found, f"python -m {words[1]}: no such module"
        text = "".join(file.read_text() for file in found[0].parent.glob("*.py"))  # options may be shared
        for word in words[2:]:
            option = word.partition("=")[0]
            assert not option.startswith("--") or option == "--help" or f'"{option}"' in text, f"{words[1]}: {option}"


def at_path(tree: Any, path: str) -> bool:
    """Whether a values path such as images.gateway.digest exists; below an empty table anything may stand."""
    for name in re.sub(r"\[\d+\]", "", path).replace("\\.", "\0").split("."):
        if isinstance(tree, dict) and not tree:
            return True
        if isinstance(tree, list) or not isinstance(tree, dict) or name.replace("\0", ".") not in tree:
            return False
        tree = tree[name.replace("\0", ".")]
    return True


def test_values_that_are_set_exist(document: Path) -> None:
    for words in commands(document, "helm"):
        for option, word in itertools.pairwise(words):
            if option in ("--set", "--set-string", "--set-file", "--set-json"):
                for path in re.findall(r"(?:^|,)([A-Za-z][\w.\[\]\\-]*)=", word):
                    assert at_path(values(), path), f"{path} is no value of charts/medforge/values.yaml"
            if option in ("-f", "--values") and "/" in word:
                assert (ROOT / word).is_file(), f"{word} is no file"


def test_values_that_are_named_exist(document: Path) -> None:
    """A span such as `gateway.replicas` whose first word is one of the chart's tables."""
    tables = {name for name, value in values().items() if isinstance(value, dict)} - {"tests", "pipelines", "images"}
    for span in re.findall(r"`([a-z]\w*(?:\.\w+)+)`", document.read_text()):
        if span.split(".")[0] in tables and not re.search(r"\.(json|yaml|md|db|html|safetensors|py|pub)$", span):
            assert at_path(values(), span), f"{span} is no value of charts/medforge/values.yaml"


@cache
def variables() -> frozenset[str]:
    """The environment variables that code, charts and images know."""
    from serving.gateway.settings import Settings

    found = {GATEWAY + name.upper() for name in Settings.model_fields}
    for folder in ("src", "serving", "pipelines", "components", "charts", "images", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".tpl", ".txt", ".sh", ".Dockerfile") and path.is_file():
                found |= set(re.findall(r"\bMEDFORGE_[A-Z0-9_]*[A-Z0-9]\b", path.read_text()))
    for file in ("Makefile", "tests/integration/chart/test_cluster.py"):
        found |= set(re.findall(r"\bMEDFORGE_[A-Z0-9_]*[A-Z0-9]\b", (ROOT / file).read_text()))
    return frozenset(name for name in found if not name.startswith(GATEWAY) or name[len(GATEWAY) :].lower() in
                     Settings.model_fields)  # fmt: skip


def test_variables_exist(document: Path) -> None:
    named = set(re.findall(r"\bMEDFORGE_[A-Z0-9_]*[A-Z0-9]\b(?![_…*])", document.read_text()))
    assert named <= variables(), sorted(named - variables())


def test_files_and_tests_that_are_named_exist(document: Path) -> None:
    for span in re.findall(r"`([^`\s]+)`", document.read_text()):
        if not re.match(rf"({FOLDERS})/", span) or any(mark in span for mark in "<>…*{$"):
            continue
        path, _, test = span.partition("::")
        place = ROOT / path
        assert place.exists(), f"{span}: no such file"
        if test:
            defined = {
                node.name for node in ast.walk(ast.parse(place.read_text())) if isinstance(node, ast.FunctionDef)
            }
            assert test in defined, f"{span}: no such test"


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        found = (document.parent / place).resolve() if place else document
        assert found.exists(), f"{target}: leads nowhere"
        if anchor:
            assert anchor in anchors(found), f"{target}: there is no such heading"


def test_every_document_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "docs" / "README.md").read_text()))
    missing = {path.name for path in (ROOT / "docs").glob("*.md")} - linked - {"README.md"}
    assert not missing, sorted(missing)


def test_no_machine_of_ours_is_named(document: Path) -> None:
    assert not re.search(r"/home/|/root/", document.read_text())
