"""Answers and likelihoods against the model used one sample at a time, and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from medforge.config import EvaluateConfig, ModelConfig
from medforge.dataset import Dataset
from medforge.dataset_writer import write_dataset
from medforge.evaluate import predict
from medforge.evaluate.predictions import Prediction, read
from medforge.files import read_json, tree_digest
from medforge.models.claims import claimable, wrong_answers
from medforge.models.encode import Encoder, collate
from medforge.models.generate import Answer
from medforge.models.load import load_model
from medforge.records import Sample
from tests.unit.models.examples import token_losses

MODEL = ModelConfig()
EVALUATE = EvaluateConfig(batch_size=5, max_new_tokens=12)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An untrained model whose end token is made likelier: some of its answers end, others run to the limit."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name][Encoder(base, 1, 2).end_id] *= 2.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, talker: Path, phantoms: Path) -> Path:
    out = tmp_path_factory.mktemp("answered") / "tuned.jsonl"
    run(talker, phantoms, out)
    return out


def run(model: Path, dataset: Path, out: Path, **changes: Any) -> dict[str, Any]:
    evaluate = EvaluateConfig.model_validate(EVALUATE.model_dump() | changes)
    return predict.run("tuned", model, dataset, out, evaluate, MODEL, seed=0)


def test_every_sample_is_answered_in_the_data_sets_order(answered: Path, phantoms: Path) -> None:
    samples = Dataset.open(phantoms).samples("test")
    rows = read(answered)
    assert [row.id for row in rows] == [sample.id for sample in samples]
    assert len({row.key for row in rows}) == len(rows)
    for row, sample in zip(rows, samples, strict=True):
        assert (row.arm, row.question) == ("tuned", sample.question)
        assert (row.answer_type, row.question_type) == (sample.answer_type, sample.question_type)
        assert row.images == tuple(image.sha256 for image in sample.images)
    assert {row.finish for row in rows} <= {"stop", "length"}


@pytest.fixture(scope="module")
def one_by_one(talker: Path, phantoms: Path) -> list[tuple[str, int, bool]]:
    """Text, tokens and whether it ended by itself, by `generate` on each prompt alone, without any padding."""
    import torch

    data = Dataset.open(phantoms)
    encoder = Encoder(talker, MODEL.min_pixels, MODEL.max_pixels)
    model = load_model(talker, "float32").cpu().eval()
    answers = []
    for sample in data.samples("test"):
        prompt = collate([encoder.encode_prompt(sample, data.images(sample))], encoder.image_id, encoder.pad_id)
        del prompt["labels"]
        with torch.inference_mode():
            output = model.generate(**prompt, max_new_tokens=EVALUATE.max_new_tokens, do_sample=False)
        new = output[0, prompt["input_ids"].shape[1] :].tolist()
        ended = new[-1] == encoder.end_id
        if ended:
            new.pop()
        text = encoder.tokenizer.decode([token for token in new if token != encoder.pad_id]).strip()
        answers.append((text, len(new), ended))
    return answers


def test_batches_do_not_change_the_answers(answered: Path, one_by_one: list[tuple[str, int, bool]]) -> None:
    rows = read(answered)
    assert [(row.prediction, row.generated_tokens, row.finish == "stop") for row in rows] == one_by_one
    # else the batches above would never have held answers of different length
    assert len({row.generated_tokens for row in rows}) > 3
    assert {row.finish for row in rows} == {"stop", "length"}


def test_a_limit_of_tokens_is_told(talker: Path, phantoms: Path, tmp_path: Path) -> None:
    run(talker, phantoms, tmp_path / "out.jsonl", max_new_tokens=1)
    rows = read(tmp_path / "out.jsonl")
    assert {(row.generated_tokens, row.finish) for row in rows} <= {(1, "length"), (0, "stop")}
    assert any(row.finish == "length" for row in rows)


def test_likelihoods_are_the_sums_over_the_answers_tokens(answered: Path, talker: Path, phantoms: Path) -> None:
    """All of the logits, one sample at a time, in float64; the model has not generated before."""
    data = Dataset.open(phantoms)
    encoder = Encoder(talker, MODEL.min_pixels, MODEL.max_pixels)
    model = load_model(talker, "float32").cpu()
    for row, sample in zip(read(answered), data.samples("test"), strict=True):
        encoded = encoder.encode(sample, data.images(sample))
        (losses,) = token_losses(model, collate([encoded], encoder.image_id, encoder.pad_id))
        assert row.nll == pytest.approx(sum(losses), rel=1e-4)
        assert row.answer_tokens == len(losses) == len(encoder.tokenizer.encode(row.reference)) + 1


def test_only_the_last_answer_of_several_turns_counts(talker: Path, tmp_path: Path, make_sample: Any) -> None:
    from medforge.records import Turn

    turns = (
        *(Turn("user", "<image>\nIs it a CT?"), Turn("assistant", "no, an MRI of the brain")),
        *(Turn("user", "Where is the lesion?"), Turn("assistant", "left")),
    )
    sample, images = make_sample(turns=turns, split="test")
    write_dataset(tmp_path / "data", [(sample, images)])
    run(talker, tmp_path / "data", tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    encoder = Encoder(talker, MODEL.min_pixels, MODEL.max_pixels)
    pictures = Dataset.open(tmp_path / "data").images(sample)
    batch = collate([encoder.encode(sample, pictures)], encoder.image_id, encoder.pad_id)
    (losses,) = token_losses(load_model(talker, "float32").cpu(), batch)
    count = len(encoder.tokenizer.encode("left")) + 1
    assert (row.reference, row.question, row.answer_tokens) == ("left", "Where is the lesion?", count)
    assert row.nll == pytest.approx(sum(losses[-count:]), rel=1e-4)


def test_text_without_an_image_is_answered(talker: Path, tmp_path: Path, make_sample: Any) -> None:
    from medforge.records import Turn

    plain, _ = make_sample(
        id="plain", images=(), turns=(Turn("user", "repeat: CT"), Turn("assistant", "CT")), split="test"
    )
    seen, images = make_sample(split="test")
    write_dataset(tmp_path / "data", [(plain, []), (seen, images)])
    run(talker, tmp_path / "data", tmp_path / "out.jsonl")
    assert [row.id for row in read(tmp_path / "out.jsonl")] == [
        sample.id for sample in Dataset.open(tmp_path / "data").samples("test")
    ]


@pytest.mark.parametrize("tear", [0, 40])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_killed_run_goes_on_to_the_same_bytes(
    answered: Path, talker: Path, phantoms: Path, tmp_path: Path, rows: int, tear: int
) -> None:
    lines = answered.read_bytes().splitlines(keepends=True)
    out = tmp_path / "tuned.jsonl"
    # rows in the order of the batches, not of the data set, and half of the next one
    kept = lines[::-1][:rows]
    out.write_bytes(b"".join(kept) + lines[0][:tear])
    told = run(talker, phantoms, out)
    assert told["reused"] == rows
    assert out.read_bytes() == answered.read_bytes()


def test_a_finished_file_needs_no_model(
    answered: Path, talker: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("medforge.evaluate.predict.load_model", refuse)
    out = tmp_path / "tuned.jsonl"
    out.write_bytes(answered.read_bytes())
    told = run(talker, phantoms, out)
    assert told == {"model": tree_digest(talker), "n": len(read(answered)), "reused": len(read(answered))}
    assert out.read_bytes() == answered.read_bytes()


def test_another_model_or_setting_is_answered_anew(
    answered: Path, talker: Path, base: Path, phantoms: Path, tmp_path: Path
) -> None:
    keys = {row.key for row in read(answered)}
    for model, changes in ((base, {}), (talker, {"max_new_tokens": 3})):
        out = tmp_path / "tuned.jsonl"
        out.write_bytes(answered.read_bytes())
        told = run(model, phantoms, out, **changes)
        assert told["reused"] == 0
        assert not keys & {row.key for row in read(out)}
        assert len(read(out)) == len(keys)


def test_a_limit_of_samples_follows_the_seed(talker: Path, phantoms: Path, tmp_path: Path) -> None:
    def ids(name: str, seed: int) -> list[str]:
        evaluate = EVALUATE.model_copy(update={"limit": 6, "max_new_tokens": 1})
        predict.run("tuned", talker, phantoms, tmp_path / name, evaluate, MODEL, seed)
        return [row.id for row in read(tmp_path / name)]

    order = [sample.id for sample in Dataset.open(phantoms).samples("test")]
    first, again, other = ids("a", 0), ids("b", 0), ids("c", 1)
    assert first == again != other
    assert len(set(first)) == 6
    assert first == [name for name in order if name in set(first)]


def grounded(samples: list[Sample]) -> list[int]:
    return [number for number, sample in enumerate(samples) if sample.question_type == "grounding"]


def test_boxes_are_read_from_the_answers(talker: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Dataset.open(phantoms).samples("test")
    answerer = predict.Answerer(talker, MODEL, EVALUATE)
    said = '{"bbox_2d": [100, 250, 500, 1200], "label": "lesion"} and more'
    monkeypatch.setattr(
        predict, "generate", lambda model, encoder, prompts, limit: [Answer(said, 9, True)] * len(prompts)
    )
    numbers = grounded(samples)
    assert numbers
    chosen = [samples[number] for number in numbers]
    nothing = [None] * len(chosen)
    rows: list[Prediction] = answerer.answer("tuned", Dataset.open(phantoms), chosen, ["k"] * len(chosen), nothing)
    for row, sample in zip(rows, chosen, strict=True):
        assert row.predicted_boxes == ((0.1, 0.25, 0.5, 1.2),)
        assert row.boxes == (sample.boxes[0].xyxy,)
        corners = ", ".join(str(round(value * 1000)) for value in sample.boxes[0].xyxy)
        assert row.reference == f'{{"bbox_2d": [{corners}], "label": "lesion"}}'


def test_an_empty_split_is_an_error(talker: Path, tmp_path: Path, make_sample: Any) -> None:
    write_dataset(tmp_path / "data", [make_sample(1)])
    with pytest.raises(ValueError, match="the test split, which is to be scored, is empty"):
        run(talker, tmp_path / "data", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def give_heads(folder: Path, region: bool = True, match: bool = True) -> Path:
    """Put untrained heads into a model's folder; their last layers are enlarged, so that samples differ in them."""
    import torch

    from medforge.models.heads import TaskHeads, save_heads

    torch.manual_seed(1)
    hidden = read_json(folder / "config.json")["text_config"]["hidden_size"]
    heads = TaskHeads(hidden, region, match)
    with torch.no_grad():
        for name, weight in heads.named_parameters():
            if not name.startswith("log_variance") and weight.ndim == 2:
                weight *= 4
    save_heads(heads, folder)
    return folder


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory, talker: Path) -> Path:
    """The talker with a region and a match head."""
    folder = tmp_path_factory.mktemp("headed") / "model"
    shutil.copytree(talker, folder)
    return give_heads(folder)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, headed: Path, phantoms: Path) -> Path:
    out = tmp_path_factory.mktemp("judged") / "tuned.jsonl"
    run(headed, phantoms, out)
    return out


def by_hand(folder: Path, phantoms: Path) -> Any:
    """A function of a sample and a claim, or None for the question alone: the heads' outputs for the state that the
    model has at the last token of that prompt, read from its own outputs without any padding."""
    import torch

    from medforge.models.heads import load_heads

    data = Dataset.open(phantoms)
    encoder = Encoder(folder, MODEL.min_pixels, MODEL.max_pixels)
    model, heads = load_model(folder, "float32").cpu().eval(), load_heads(folder)
    assert heads is not None

    def outputs(sample: Sample, claim: str | None) -> Any:
        images = data.images(sample)
        encoded = (
            encoder.encode_prompt(sample, images) if claim is None else encoder.encode_claim(sample, images, claim)
        )
        batch = collate([encoded], encoder.image_id, encoder.pad_id)
        del batch["labels"]
        with torch.inference_mode():
            state = model(**batch, output_hidden_states=True).hidden_states[-1][:, -1]
            return heads.region(state)[0].tolist() if claim is None else torch.sigmoid(heads.match(state)).item()

    return outputs


def test_heads_judge_the_state_at_the_end_of_each_prompt(judged: Path, headed: Path, phantoms: Path) -> None:
    samples = Dataset.open(phantoms).samples("test")
    wrong = wrong_answers(samples, predict.CLAIM_SEED)
    outputs = by_hand(headed, phantoms)
    rows = read(judged)
    for row, sample, claim in zip(rows, samples, wrong, strict=True):
        assert row.heads == ("region", "match")
        x, y, width, height = outputs(sample, None)
        corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        assert row.region == pytest.approx([min(1, max(0, value)) for value in corners], abs=1e-4)
        assert row.region_target == (sample.boxes[0].xyxy if len(sample.boxes) == 1 else None)
        if not claimable(sample):
            assert (row.match, row.match_reference, row.match_wrong) == (None, None, None)
            continue
        assert row.match_reference == pytest.approx(outputs(sample, sample.answer), abs=1e-4)
        assert row.match_wrong == (None if claim is None else pytest.approx(outputs(sample, claim), abs=1e-4))
        if row.match is not None:
            assert row.match == pytest.approx(outputs(sample, row.prediction), abs=1e-4)
    # else nothing above was compared
    for name in ("match", "match_reference", "match_wrong", "region_target"):
        present = [getattr(row, name) is not None for row in rows]
        assert any(present) and len({getattr(row, name) for row in rows}) > 2
    assert not all(claimable(sample) for sample in samples)


def test_heads_do_not_change_the_answers(judged: Path, answered: Path) -> None:
    for with_heads, without in zip(read(judged), read(answered), strict=True):
        for name in ("prediction", "nll", "generated_tokens", "predicted_boxes", "reference"):
            assert getattr(with_heads, name) == getattr(without, name)
        assert without.heads == () and not {"heads", "region", "match"} & set(without.to_row())


def test_a_killed_run_with_heads_goes_on_to_the_same_bytes(
    judged: Path, headed: Path, phantoms: Path, tmp_path: Path
) -> None:
    lines = judged.read_bytes().splitlines(keepends=True)
    out = tmp_path / "tuned.jsonl"
    out.write_bytes(b"".join(lines[::-1][:5]) + lines[0][:40])
    assert run(headed, phantoms, out)["reused"] == 5
    assert out.read_bytes() == judged.read_bytes()


def test_claims_do_not_depend_on_which_samples_are_asked(
    judged: Path, headed: Path, phantoms: Path, tmp_path: Path
) -> None:
    whole = {row.id: row for row in read(judged)}
    evaluate = EVALUATE.model_copy(update={"limit": 9})
    predict.run("tuned", headed, phantoms, tmp_path / "few.jsonl", evaluate, MODEL, seed=5)
    few = read(tmp_path / "few.jsonl")
    assert len(few) == 9 and any(row.match_wrong is not None for row in few)
    for row in few:
        expected = whole[row.id].match_wrong
        assert row.match_wrong == (None if expected is None else pytest.approx(expected, abs=1e-4))


def test_a_model_with_one_head_leaves_the_other_out(talker: Path, phantoms: Path, tmp_path: Path) -> None:
    shutil.copytree(talker, tmp_path / "model")
    give_heads(tmp_path / "model", region=False)
    run(tmp_path / "model", phantoms, tmp_path / "out.jsonl", limit=8)
    for row in read(tmp_path / "out.jsonl"):
        assert (row.heads, row.region, row.region_target) == (("match",), None, None)
    give_heads(tmp_path / "model", match=False)
    run(tmp_path / "model", phantoms, tmp_path / "out.jsonl", limit=8)
    for row in read(tmp_path / "out.jsonl"):
        assert (row.heads, row.match, row.match_reference, row.match_wrong) == (("region",), None, None, None)
        assert row.region is not None


@pytest.mark.parametrize("said", ["", "yes <|vision_start|>", "see <image>", "at <|box:0|>"])
def test_an_answer_that_cannot_be_proposed_is_not_judged(
    said: str, headed: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(model: Any, encoder: Any, prompts: Any, limit: int) -> list[Answer]:
        return [Answer(said if number else "yes", 3, True) for number in range(len(prompts))]

    monkeypatch.setattr(predict, "generate", answer)
    data = Dataset.open(phantoms)
    samples = [sample for sample in data.samples("test") if claimable(sample)][:3]
    rows = predict.Answerer(headed, MODEL, EVALUATE).answer("tuned", data, samples, ["k"] * 3, [None, "no", None])
    assert [row.match is None for row in rows] == [False, True, True]
    assert [row.match_wrong is None for row in rows] == [True, False, True]
    assert all(row.match_reference is not None for row in rows)


def test_text_without_an_image_has_no_region(headed: Path, tmp_path: Path, make_sample: Any) -> None:
    from medforge.records import Turn

    turns = (Turn("user", "repeat: CT"), Turn("assistant", "CT"))
    plain, _ = make_sample(id="plain", images=(), turns=turns, split="test")
    write_dataset(tmp_path / "data", [(plain, [])])
    run(headed, tmp_path / "data", tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    assert (row.heads, row.region, row.match_reference) == (("region", "match"), None, None)
