"""`python charts/lint.py`: the chart rendered with each of its values files, looked at by helm, yamllint and checkov.

yamllint and checkov are programs of their own, taken from PATH: checkov does not install beside MedForge, so it has an
environment of its own (`pip install checkov yamllint` in a new one).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

CHART = Path(__file__).parent / "medforge"
SETS = {
    "pilot": ["values-pilot.yaml"],
    "production": ["values-production.yaml", "ci/site-values.yaml"],
    "airgapped": ["values-production.yaml", "values-airgapped.yaml", "ci/site-values.yaml"],
}
_YAMLLINT = "{extends: default, rules: {line-length: disable, document-start: disable, braces: disable, \
indentation: {indent-sequences: whatever}, comments: {min-spaces-from-content: 1}}}"
_RENDERED = "{extends: relaxed, rules: {line-length: disable, indentation: disable, trailing-spaces: disable, \
empty-lines: disable, key-duplicates: enable}}"


def overlaid(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Values over values, as Helm lays several files over each other."""
    result = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = overlaid(result[key], value) if both else value
    return result


def main() -> int:
    """Lint. Returns how many looks found something."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="medforge-") as work:
        for name, files in SETS.items():
            values: dict[str, Any] = {}
            for file in files:
                values = overlaid(values, yaml.safe_load((CHART / file).read_text(encoding="utf-8")))
            report = helm.lint(CHART, values, strict=True)
            wrong = [message["error"] for message in report["messages"] if message["severity"] > 1]
            print("\n".join(wrong) or f"helm lint, {name}: nothing found")
            failed += bool(wrong or report["errors"])
            with helm.Chart.load(CHART) as chart:
                rendered = chart.render(values, name="medforge", namespace="medforge")
            texts = [text for template, text in rendered.items() if template.endswith(".yaml") and text.strip()]
            (Path(work) / f"{name}.yaml").write_text("\n---\n".join(texts), encoding="utf-8")
        commands = (
            ["yamllint", "-d", _YAMLLINT, *map(str, sorted(CHART.glob("*.yaml"))), str(CHART / "ci")],
            ["yamllint", "-d", _RENDERED, work],
            ["checkov", "-d", work, "--config-file", str(CHART / ".checkov.yaml")],
        )
        for command in commands:
            ended = subprocess.run(command, check=False)  # noqa: S603  our own lists
            print(f"{command[0]}: {'nothing found' if ended.returncode == 0 else 'see above'}", flush=True)
            failed += ended.returncode != 0
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is not installed: make an environment with `pip install checkov yamllint` in it")
