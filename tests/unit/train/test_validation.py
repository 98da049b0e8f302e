"""Validation: each figure against its own definition, and what is absent where nothing bears it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medforge.config import StageConfig
from medforge.dataset import Dataset, choose
from medforge.metrics import correct
from medforge.metrics.boxes import iou
from medforge.metrics.ranking import auroc
from medforge.models.claims import claim, claimable, wrong_answers
from medforge.models.encode import Encoder, collate
from medforge.models.generate import answer_boxes, answer_text, generate, pooled, read_boxes, region_target
from medforge.models.heads import load_task_model, to_xyxy
from medforge.models.load import load_model, stack
from medforge.train.validation import Validation
from medforge.train.validation import figures as names_of
from tests.unit.models.examples import token_losses
from tests.unit.train.runs import MODEL, SEED, about, changed, copy_samples, figures, train

# says yes and no, and is sometimes right
STAGE = changed(
    tune=["vision_merger", "language_attention", "language_mlp"],
    method="full",
    steps=8,
    batch_size=8,
    learning_rate=2e-3,
    samples=None,
    heads={},
    evaluate_every=8,
    validation_samples=9,
    generate_samples=4,
    max_new_tokens=6,
)


@dataclass(frozen=True)
class Setting:
    """A stage that is about to validate."""

    validation: Validation
    module: Any
    shown: list[tuple[str, str, str, Sequence[Any]]]

    def run(self) -> dict[str, float]:
        return self.validation.run(self.shown.extend)


def setting(
    folder: Path, base: Path, dataset: Path, stage: StageConfig, before: Path | None = None, **changes: Any
) -> Setting:
    from medforge.models.determinism import seeded
    from medforge.train import parallel
    from medforge.train.adapters import parameter_groups
    from medforge.train.prepare import build, read
    from medforge.train.stage import Inputs, job_of

    paths = (folder / "out", folder / "work", folder / "logs")
    job = job_of(Inputs(base, dataset, before), *paths, changed(stage, **changes), MODEL, SEED)
    material, world = read(job), parallel.start()
    with seeded(SEED):
        trainee, targets, speed = build(job, material, world.device)
    engine = parallel.engine(trainee, parameter_groups(trainee, targets, job.stage), job.parallel, world, 1.0)
    return Setting(Validation(job.stage, material.held_out, engine, world, speed, SEED), trainee, [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Path:
    """The adapter of a stage with heads that has learned a little."""
    return train(tmp_path_factory.mktemp("trained"), base, phantoms, STAGE)


@pytest.fixture(scope="module")
def held_out(phantoms: Path) -> list[Any]:
    """The samples that the stage validates on."""
    return choose(Dataset.open(phantoms).samples("validation"), STAGE.validation_samples, SEED)


@pytest.fixture(scope="module")
def encoder(base: Path) -> Encoder:
    return Encoder(base, MODEL.min_pixels, MODEL.max_pixels)


def test_the_loss_is_the_mean_over_the_answers_tokens(
    trained: Path, base: Path, phantoms: Path, encoder: Encoder, held_out: list[Any]
) -> None:
    data = Dataset.open(phantoms)
    batch = collate([encoder.encode(s, data.images(s)) for s in held_out], encoder.image_id, encoder.pad_id)
    model = load_model(base, "float32", [trained]).cpu()
    wanted = np.mean([loss for row in token_losses(model, batch) for loss in row])
    assert figures(trained, "eval_loss")[8] == pytest.approx(wanted, rel=1e-5)
    assert figures(trained, "eval_perplexity")[8] == pytest.approx(np.exp(wanted), rel=1e-4)


@pytest.mark.parametrize("tokens", [8192, 64])
def test_the_loss_does_not_depend_on_micro_batches(
    tmp_path: Path, trained: Path, base: Path, phantoms: Path, tokens: int
) -> None:
    """Nor on a run of training before it: the same weights, loaded, have the same figures."""
    stage = changed(STAGE, name="next", micro_tokens=tokens)
    found = setting(tmp_path, base, phantoms, stage, before=trained.parent).run()
    assert found == pytest.approx(about(trained)["validation"], rel=1e-4)


def test_accuracy_is_that_of_generated_answers(
    tmp_path: Path, trained: Path, base: Path, phantoms: Path, encoder: Encoder, held_out: list[Any]
) -> None:
    """Of a fixed subset, spread over the split: each asked alone, of the model as anyone loads it."""
    data, model = Dataset.open(phantoms), load_model(base, "float32", [trained])
    right: dict[str, list[bool]] = {"open": [], "closed": []}
    said = []
    for sample in held_out[::2][:4]:
        prompt = encoder.encode_prompt(sample, data.images(sample))
        [answer] = generate(model, encoder, [prompt], STAGE.max_new_tokens)
        reference = answer_text(sample, encoder.family, prompt.sizes)
        boxes = read_boxes(answer.text, sample, encoder.family, prompt.sizes)
        is_right = correct(
            sample.question, reference, answer.text, sample.answer_type, answer_boxes(sample), boxes
        )  # fmt: skip
        right[sample.answer_type].append(is_right)
        said.append((sample.question, reference, answer.text))
    every = right["open"] + right["closed"]
    assert 0 < sum(every) < len(every) == 4, "else the figures say little"
    told = about(trained)["validation"]
    assert told["accuracy"] == np.mean(every)
    assert {kind: told.get(f"{kind}_accuracy") for kind in right} == {
        kind: np.mean(found) if found else None for kind, found in right.items()
    }
    again = setting(tmp_path, base, phantoms, changed(STAGE, name="next"), before=trained.parent)
    again.run()
    assert [row[:3] for row in again.shown] == said
    assert [image.size for *_, [image] in again.shown] == [(96, 96)] * 4


def test_the_heads_figures(trained: Path, base: Path, phantoms: Path, encoder: Encoder, held_out: list[Any]) -> None:
    """From the model and its heads as one call loads them, a prompt at a time."""
    data, task = Dataset.open(phantoms), load_task_model(base, "float32", [trained])

    def state(sample: Any) -> Any:
        return pooled(task.model, encoder, [encoder.encode_prompt(sample, data.images(sample))])

    targets = [(sample, region_target(sample)) for sample in held_out]
    overlaps = [
        iou(tuple(to_xyxy(task.heads.region(state(sample)))[0].tolist()), box) for sample, box in targets if box
    ]
    assert len(overlaps) >= 3
    told = about(trained)["validation"]
    assert told["region_iou"] == pytest.approx(np.mean(overlaps), rel=1e-4)
    fits, wrong = [], []
    for sample, answer in zip(held_out, wrong_answers(held_out, SEED), strict=True):
        if answer is not None and claimable(sample):
            fits.append(float(task.heads.match(state(claim(sample, sample.answer)))))
            wrong.append(float(task.heads.match(state(claim(sample, answer)))))
    assert len(fits) >= 3
    assert told["match_auroc"] == auroc(fits, wrong)
    assert 0 < told["match_auroc"] < 1


def test_what_no_sample_bears_is_absent(tmp_path: Path, base: Path, phantoms: Path) -> None:
    """And is known to be before anything is computed."""

    def kept(name: str, of: Any) -> Path:
        return copy_samples(phantoms, tmp_path / name, lambda sample: sample.split == "train" or of(sample))

    def names(dataset: Path, **changes: Any) -> set[str]:
        given = setting(tmp_path, base, dataset, STAGE, **changes)
        found = set(given.run())
        assert set(names_of(given.validation.stage, given.validation.samples.samples, SEED)) == found
        return found

    everything = {"loss", "perplexity", "region_iou", "match_auroc", "accuracy", "open_accuracy", "closed_accuracy"}
    assert names(phantoms) == everything
    no_closed = names(kept("open", lambda s: s.answer_type == "open"))
    assert no_closed <= everything - {"closed_accuracy"} and "accuracy" in no_closed
    assert "region_iou" not in names(kept("boxes", lambda s: len(s.boxes) != 1))
    boxes_only = names(kept("claims", lambda s: s.question_type == "grounding"))
    assert "match_auroc" not in boxes_only and "region_iou" in boxes_only
    for name, heads in (("region", {"match": False}), ("match", {"region": False})):
        assert {"region_iou", "match_auroc"} & names(phantoms, heads=heads) == {
            "region_iou" if name == "region" else "match_auroc"
        }
    assert names(phantoms, heads=None, generate_samples=0) == {"loss", "perplexity"}


@pytest.mark.parametrize(("tokens", "at_once"), [(8192, 16), (16, 1)])
def test_prompts_are_answered_together_where_there_is_room(
    tmp_path: Path, base: Path, phantoms: Path, tokens: int, at_once: int
) -> None:
    assert setting(tmp_path, base, phantoms, STAGE, micro_tokens=tokens).validation.at_once == at_once


@pytest.mark.parametrize(("where", "doing"), [("engine", "validating"), ("generate", "generating after")])
def test_out_of_memory_names_the_setting(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, where: str, doing: str
) -> None:
    import torch

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    given = setting(tmp_path, base, phantoms, STAGE)
    if where == "engine":
        monkeypatch.setattr(type(given.validation.engine), "__call__", full)
    else:
        monkeypatch.setattr("medforge.train.validation.generate", full)
    with pytest.raises(ValueError, match=rf"out of memory while {doing} \d+ tokens .*lower micro_tokens from 8192 to"):
        given.run()


def test_the_model_is_left_as_it_was(tmp_path: Path, base: Path, phantoms: Path) -> None:
    import torch

    given = setting(tmp_path, base, phantoms, STAGE, lora={"dropout": 0.5}, method="lora")
    given.module.heads.eval()
    modes = [part.training for part in given.module.modules()]
    assert any(modes) and not all(modes)
    before = torch.random.get_rng_state()
    first = given.run()
    assert [part.training for part in given.module.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in given.module.parameters())
    assert given.run() == first  # without dropout


@pytest.mark.parametrize(("count", "asked"), [(0, []), (1, [0]), (2, [0, 4]), (4, [0, 2, 4, 6]), (32, list(range(9)))])
def test_who_is_asked(tmp_path: Path, base: Path, phantoms: Path, count: int, asked: list[int]) -> None:
    given = setting(tmp_path, base, phantoms, STAGE, generate_samples=count)
    assert given.validation.asked == asked


def test_stack_of_a_stage_with_heads(trained: Path) -> None:
    assert stack(trained.parent) == [trained]
    assert trained.parent.name == "out"
