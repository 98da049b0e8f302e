"""The rule of the house on imports: downwards only, a step never imports another, heavy libraries only when used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import medforge

ROOT = Path(medforge.__file__).parent

# from the top down; a module may import from its own layer (but for steps) and from the layers below
FACES, STEPS, COMMON, GROUND = 3, 2, 1, 0
LAYERS = {
    **dict.fromkeys(("__main__", "cli", "commands", "steps", "audit", "apikeys", "rollout"), FACES),
    **dict.fromkeys(("convert", "validate", "train", "merge", "evaluate", "release", "synthesize"), STEPS),
    **dict.fromkeys(
        (
            *("models", "metrics", "dataset", "dataset_writer", "storage", "embedded", "s3", "transfers", "reference"),
            *("checkpoints", "checkpoint_files"),
        ),
        COMMON,
    ),
    **dict.fromkeys(("records", "config", "stages", "files", "progress", "drawing", "lifetime", "workspace"), GROUND),
}
OTHER_PARTS = {"kfp", "kserve", "fastapi", "components", "pipelines", "serving"}
HEAVY = {"deepspeed", "torch", "transformers", "peft", "accelerate", "pandas", "matplotlib", "datasets", "tensorboard"}
# a subclass needs its base class when its module is imported; these are imported only where they are used
MAY_BE_HEAVY = {
    "train/trainee.py": {"torch"},
    "models/heads.py": {"torch"},
}

FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, at_import: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of what a file imports: anywhere in it, or (`at_import`) only when it is imported."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        if at_import and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        ):
            return
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def own_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of medforge of each import of another part. `from medforge import __version__` is none."""
    for line, name in imports(path, at_import=False):
        package, _, rest = name.partition(".")
        part = rest.split(".")[0]
        if package == "medforge" and part in LAYERS and part != part_of(path):
            yield line, part


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_downwards(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert list(own_parts(path)) == []
        return
    assert part in LAYERS, f"{part} has no layer yet: say in LAYERS where it stands"
    layer = LAYERS[part]
    for line, other in own_parts(path):
        assert LAYERS[other] <= layer, f"{name_of(path)}:{line}: {part} imports {other}, which stands above it"
        if layer == STEPS:
            assert LAYERS[other] < STEPS, f"{name_of(path)}:{line}: the step {part} imports the step {other}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_library_knows_no_server_and_no_pipeline(path: Path) -> None:
    for line, name in imports(path, at_import=False):
        assert name.split(".")[0] not in OTHER_PARTS, f"{name_of(path)}:{line}: imports {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    allowed = MAY_BE_HEAVY.get(name_of(path), set())
    for line, name in imports(path, at_import=True):
        assert name.split(".")[0] not in HEAVY - allowed, f"{name_of(path)}:{line}: imports {name} at module level"


def test_every_part_is_imported_by_a_name_that_is_known() -> None:
    """`from medforge.x import y` of an x that LAYERS lacks would pass the tests above unseen."""
    for path in FILES:
        for line, name in imports(path, at_import=False):
            package, _, rest = name.partition(".")
            if package == "medforge":
                known = rest.split(".")[0] in LAYERS or rest == "__version__"
                assert known, f"{name_of(path)}:{line}: {name}"


def modules_after(*arguments: str) -> set[str]:
    """The top-level modules that are loaded after ``python -m medforge`` with these arguments."""
    script = (
        "import json, runpy, sys\n"
        f"sys.argv = ['medforge', *{list(arguments)!r}]\n"
        "try:\n"
        "    runpy.run_module('medforge', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended.code\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "usage: medforge" in ended.stdout
    return set(json.loads(ended.stdout.splitlines()[-1]))


def commands() -> list[str]:
    from medforge.cli import parser

    choices = next(action.choices for action in parser()._actions if action.dest == "command")
    assert choices
    return sorted(choices)


def test_help_loads_nothing_heavy() -> None:
    assert not modules_after("--help") & (HEAVY | {"pydantic", "pyarrow", "numpy", "PIL", "minio", "yaml", "kfp"})


@pytest.mark.parametrize("command", commands()[:1] + commands()[-1:])
def test_a_commands_help_loads_nothing_heavy(command: str) -> None:
    assert not modules_after(command, "--help") & (HEAVY | {"pydantic", "pyarrow"})
