"""The model card and the software bill of materials of a release. Both are deterministic: neither bears a date."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from medforge.release.policy import verdict_markdown

_USE = """\
## Intended use

Research, and a draft that a qualified person reviews: answering questions about medical images of the kinds that the
data set holds, and marking regions in them.

**Not for diagnostic use without review.** The model is not a medical device. No decision about a patient may rest on
its answer alone.

## Limitations

- The figures below hold for the data set's images, questions and languages, and tell nothing about others: other
  scanners, populations, findings or ways of asking.
- The model answers when it does not know. It can name findings that are not there and miss findings that are.
- Slices with few samples are not evidence; `verdict.json` says which rules had enough.
- The base model's own licence and limitations stay in force.
"""


def model_card(about: dict[str, Any], verdict: dict[str, Any], results: dict[str, Any] | None) -> str:
    """The release's README.md: front matter, use, limitations, figures, verdict and digests.

    `about` may hold name, base, base_digest, dataset, dataset_digest, licence, languages, code_version and more;
    plain values are all listed under "Where it comes from". What is missing is said to be not stated.
    """
    name = str(about.get("name") or "unnamed")
    lines = [
        *_front_matter(about),
        f"# {name}",
        "",
        f"{name} is {about.get('base') or 'a base model that is not stated'}, fine-tuned with MedForge on "
        f"{about.get('dataset') or 'a data set that is not stated'} "
        f"(licence: {about.get('licence') or 'not stated'}).",
        "",
        _USE,
        "## Verdict",
        "",
        verdict_markdown(verdict),
        *_results_table(results, verdict),
        "## Where it comes from",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {_cell(key)} | `{_cell(value)}` |" for key, value in sorted(about.items()) if _is_plain(value)),
        f"| policy | `{_cell(verdict['policy']['name'])}` |",
        f"| policy sha256 | `{verdict['policy']['sha256']}` |",
        "",
        "`manifest.json` holds the SHA-256 of every file; the release is named by the SHA-256 of that manifest. "
        "`sbom.json` lists the software that made it. Signatures of reviewers are in `signatures/`.",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(about: dict[str, Any]) -> list[str]:
    import yaml

    values: dict[str, Any] = {
        "base_model": about.get("base"),
        "datasets": [about["dataset"]] if about.get("dataset") else None,
        "license": "other",
        "license_name": about.get("licence"),
        "language": about.get("languages"),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["medical", "medforge", "vision-language"],
    }
    stated = {key: value for key, value in values.items() if value}
    return ["---", yaml.safe_dump(stated, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _results_table(results: dict[str, Any] | None, verdict: dict[str, Any]) -> list[str]:
    """Slices and metrics down, arms across; nothing if there are no results."""
    arms = (results or {}).get("arms") or {}
    if not arms:
        return []
    # The judged arms first, then the others (a champion) by name.
    names = sorted(arms, key=lambda arm: (arm != verdict["candidate"], arm != verdict["reference"], arm))
    rows = sorted({(part, metric) for arm in arms.values() for part, metrics in arm.items() for metric in metrics})
    lines = [
        "## Results",
        "",
        f"| Slice | Metric | {' | '.join(names)} | n |",
        f"| --- | --- |{' ---: |' * (len(names) + 1)}",
    ]
    for part, metric in rows:
        figures = [arms[arm].get(part, {}).get(metric) or {} for arm in names]
        values = [f"{f['value']:.4g}" if isinstance(f.get("value"), int | float) else "–" for f in figures]
        counts = sorted({str(f["n"]) for f in figures if "n" in f})
        lines.append(f"| {_cell(part)} | {_cell(metric)} | {' | '.join(values)} | {' / '.join(counts)} |")
    return [*lines, ""]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def sbom(name: str, distributions: Iterable[metadata.Distribution] | None = None) -> dict[str, Any]:
    """The software bill of materials of the release `name` as a CycloneDX 1.5 document.

    Its components are `distributions`, by default those installed in this environment, sorted by name; one that is
    found twice on the path is listed once, as Python would import it. https://cyclonedx.org/docs/1.5/json/
    """
    components: dict[str, dict[str, Any]] = {}
    for distribution in metadata.distributions() if distributions is None else distributions:
        title, version = _field(distribution, "Name"), _field(distribution, "Version")
        if not title or not version:  # the remains of a broken installation
            continue
        package = re.sub(r"[-_.]+", "-", title).lower()
        purl = f"pkg:pypi/{package}@{version}"
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": purl,
            "name": package,
            "version": version,
            "purl": purl,
        }
        if licence := _field(distribution, "License-Expression"):
            component["licenses"] = [{"expression": licence}]
        components.setdefault(package, component)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "machine-learning-model", "name": name}},
        "components": [components[package] for package in sorted(components)],
    }


def _field(distribution: metadata.Distribution, name: str) -> str:
    return str(distribution.metadata[name]) if name in distribution.metadata else ""
