"""The publish step: what it puts into a release beside what it was given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medforge.config import DataConfig, PhantomConfig, PolicyConfig, RuleConfig, RunConfig, StageConfig
from medforge.convert import run as convert
from medforge.dataset import Dataset
from medforge.embedded import serve
from medforge.evaluate.predictions import append
from medforge.files import write_json
from medforge.reference import FILE, load
from medforge.release.policy import judge
from medforge.release.publish import fetch_release
from medforge.steps.release import publish
from medforge.storage import connect
from tests.unit.evaluate.examples import answers

RULES = [RuleConfig(name="good-enough", metric="exact_match", bound=0.5, margin=0.1)]


def test_a_release_bears_the_reference_of_what_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PolicyConfig(name="unit", rules=RULES)
    config = RunConfig(name="unit", stages=[StageConfig(name="see", tune=["vision_merger"], steps=1)], policy=policy)
    convert("phantom", tmp_path / "dataset", DataConfig(source="phantom", phantom=PhantomConfig(images=24, size=64)))
    data = Dataset.open(tmp_path / "dataset")
    samples = data.samples(config.evaluate.split)[:-1]  # the run may have asked of some only
    texts = ["yes" if number % 3 == 0 else "no" for number in range(len(samples))]
    (tmp_path / "tuned").mkdir()
    append(tmp_path / "tuned" / "tuned.jsonl", answers(samples, "tuned", texts))
    figures = {"tuned": 0.9, "base": 0.4}
    results = {"arms": {arm: {"all": {"exact_match": {"value": v, "n": 100}}} for arm, v in figures.items()}}
    write_json(tmp_path / "results" / "results.json", results)
    write_json(tmp_path / "verdict.json", judge(results, policy))
    for folder in ("model", "base", "adapters"):
        write_json(tmp_path / folder / "config.json", {})
    (tmp_path / "report.html").write_text("<p>report</p>")

    def published() -> str:
        names = ("model", "base", "adapters", "dataset", "tuned", "results", "verdict.json", "report.html")
        return publish(config.to_json(), *(str(tmp_path / name) for name in names))

    with serve(tmp_path / "root") as environment:
        for name, value in environment.items():
            monkeypatch.setitem(os.environ, name, value)
        digest = published()
        assert published() == digest
        with connect() as store:
            manifest = fetch_release(store, config.publish.bucket, digest, tmp_path / "got")
    assert FILE in manifest["files"]
    features = load(tmp_path / "got" / FILE)["features"]
    assert features["brightness"]["n"] == len({ref.sha256 for sample in samples for ref in sample.images})
    assert features["closed"]["n"] == len(samples)
    assert features["closed"]["shares"][0] == pytest.approx(texts.count("yes") / len(texts), abs=1e-6)
    told = (tmp_path / "got" / FILE).read_text()
    assert not any(sample.id in told or sample.images[0].sha256 in told for sample in samples)
