"""The guide's helm commands render: chart, values files and --set of each, as a new operator would type them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import yaml

from tests.unit.docs.test_docs import DOCUMENTS, ROOT, commands

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")

PUBLIC_KEY = "-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n"
# what an operator has of their own: the guide's site.yaml
SITE: dict[str, Any] = {
    "images": {
        "registry": "mirror.hospital.example",
        **{name: {"digest": f"sha256:{'a' * 64}"} for name in ("gateway", "predictor", "data", "train")},
    },
    "ingress": {"host": "medforge.example.org"},
    "objectStore": {"endpoint": "s3.example.org"},
    "networkPolicy": {
        name: {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]} for name in ("database", "redis", "objectStore")
    },
    "reviewers": {"keys": {"dr-smith.pub": PUBLIC_KEY}},
}
COMMANDS = [
    words
    for document in DOCUMENTS
    for words in commands(document, "helm")
    if words[:1] in (["install"], ["upgrade"], ["template"])
    and any("charts/medforge" in w or ".tgz" in w for w in words)
]


def merge(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` laid over `into`, table by table, as Helm does with values files."""
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(into.get(name), dict)
        into[name] = merge(into[name], value) if both else value
    return into


def values_of(words: list[str]) -> dict[str, Any]:
    """The values that a command's -f, --set and --set-file give."""
    given: dict[str, Any] = {}
    for option, word in itertools.pairwise(words):
        if option == "-f":
            merge(given, SITE if word == "site.yaml" else yaml.safe_load((ROOT / word).read_text()))
        elif option in ("--set", "--set-file"):
            path, _, value = word.partition("=")
            tree: Any = {"DIGEST": "b" * 64}.get(value, value) if option == "--set" else PUBLIC_KEY
            for part in reversed(path.replace("\\.", "\0").split(".")):
                tree = {part.replace("\0", "."): tree}
            merge(given, tree)
    return given


def test_the_guide_has_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_guide_renders(words: list[str]) -> None:
    given = values_of(words)
    if "--reuse-values" in words:  # of the pilot that stands
        given = merge(values_of(["-f", "charts/medforge/values-pilot.yaml"]) | {"reviewers": SITE["reviewers"]}, given)
    chart = helm.Chart.load(str(ROOT / "charts" / "medforge"))
    chart.validate_schema(given)
    rendered = chart.render(given, name="medforge", namespace="medforge")
    kinds = {
        document["kind"]
        for text in rendered.values()
        for document in yaml.safe_load_all(text if "kind:" in text else "")
        if document
    }
    assert {"Deployment", "Service", "NetworkPolicy"} <= kinds
    assert ("InferenceService" in kinds) == ("stable" in given)
