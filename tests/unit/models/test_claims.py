"""Claims: which samples make one, which answers are certainly wrong, and how wrong answers are drawn."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.config import PhantomConfig
from medforge.convert.phantom import rows
from medforge.models.claims import claim, claimable, contradicts, opposite, wrong_answers
from medforge.models.encode import Encoder
from medforge.records import ImageRef, Sample, Turn
from tests.unit.models.examples import picture


def ask(question: str, answer: str, study: str = "a", **changes: Any) -> Sample:
    """A sample of `study`, whose only image bears the study's name."""
    values: dict[str, Any] = {
        "id": f"{study} {question} {answer}",
        "images": (ImageRef(study, 8, 8),),
        "turns": (Turn("user", f"<image>\n{question}"), Turn("assistant", answer)),
        "answer_type": "open",
        "question_type": "position",
        "language": "en",
        "study_id": study,
        "source": "unit",
        "licence": "CC0-1.0",
        "split": "train",
    }
    return Sample(**(values | changes))


WHERE = "Where is the lesion?"


def test_a_question_and_an_answer_in_words_make_a_claim() -> None:
    good = ask(WHERE, "left")
    user, assistant = good.turns
    assert claimable(good)
    assert claimable(ask(WHERE, "left", turns=(Turn("system", "Be brief."), user, assistant)))
    assert not claimable(ask(WHERE, "left", turns=(user, assistant, user, assistant)))
    assert not claimable(ask(WHERE, "left", turns=(user,)))
    assert not claimable(ask(WHERE, "left", turns=(assistant, user)))
    assert not claimable(ask(WHERE, "It is at <|box:0|>."))
    assert not claimable(ask(WHERE, "left", images=()))  # nothing that it could fit


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        *(("yes", "no"), ("No", "Yes"), ("YES", "NO"), ("Yes.", "No."), (" no ", "yes")),
        *(
            ("是", "否"),
            ("否", "是"),
            ("是的", "不是"),
            ("不是。", "是的。"),
            ("有", "没有"),
            ("没有", "有"),
            ("无", "有"),
        ),
        *(
            ("不包含", "包含"),
            ("yes, there is", None),
            ("normal", None),
            ("left", None),
            ("有两个", None),
            ("...", None),
        ),
    ],
)
def test_a_bare_yes_or_no_has_an_opposite(answer: str, other: str | None) -> None:
    assert opposite(answer) == other


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        *(
            ("left", "right"),
            ("upper left", "lower left"),
            ("upper left", "upper right lung"),
            ("left", "upper middle"),
        ),
        *(("upper middle", "lower middle"), ("center", "upper middle"), ("right middle lobe", "right upper lobe")),
        *(("liver", "left lung"), ("T1", "T2"), ("CT", "X-ray"), ("one", "none"), ("two", "3")),
        *(("左肺", "右肺"), ("左上叶", "左下叶"), ("横断面", "冠状面"), ("axial plane", "coronal plane")),
    ],
)
def test_answers_that_cannot_both_be_right_contradict(answer: str, other: str) -> None:
    one, two = ask(WHERE, answer), ask(WHERE, other, study="b")
    assert contradicts(one, two)
    assert contradicts(two, one)


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ("left", "Left."),  # the same
        ("left", "upper left"),  # one holds the other
        ("left lung", "lungs"),
        ("the right lung, liver", "liver"),  # an item of a list
        ("Cardiomegaly, effusion", "effusion and infiltration"),
        ("肺", "左肺"),
        ("upper left", "left upper lobe"),  # in another order
        ("right", "top"),  # a place can be both
        ("right", "liver"),
        ("both lungs", "left lung"),
        ("maybe the left", "right"),
        ("plain film", "X-ray"),  # other ways of writing
        ("T2 weighted", "MRI"),
        ("two", "2"),
        ("large mass", "round mass"),  # a shared word
        ("...", "left"),
    ],
)
def test_when_in_doubt_nothing_contradicts(answer: str, other: str) -> None:
    one, two = ask(WHERE, answer), ask(WHERE, other, study="b")
    assert not contradicts(one, two)
    assert not contradicts(two, one)


@pytest.mark.parametrize(
    "changes", [{"question_type": "organ"}, {"answer_type": "closed"}, {"language": "zh"}, {"study_id": "a"}]
)
def test_only_answers_of_the_same_kind_and_of_another_study_contradict(changes: dict[str, str]) -> None:
    one = ask(WHERE, "left")
    assert contradicts(one, ask(WHERE, "right", study="b"))
    assert not contradicts(one, ask(WHERE, "right", study="b", **changes))


def test_two_names_of_one_diagnosis_do_not_contradict() -> None:
    def finding(answer: str, study: str, diagnosis: str | None, kind: str = "abnormality") -> Sample:
        return ask("What is seen?", answer, study, question_type=kind, target_diagnosis=diagnosis)

    one = finding("cardiomegaly", "a", "Cardiomegaly")
    assert not contradicts(one, finding("enlarged heart", "b", "cardiomegaly"))
    assert contradicts(one, finding("pleural effusion", "b", "effusion"))
    assert contradicts(one, finding("pleural effusion", "b", None))
    # a question of a kind that nobody knows may ask for the finding as well
    one = finding("cardiomegaly", "a", "cardiomegaly", "impression")
    assert not contradicts(one, finding("enlarged heart", "b", "cardiomegaly", "impression"))
    # the place of a lesion is no other name of it
    assert contradicts(finding("left", "a", "lesion", "position"), finding("right", "b", "lesion", "position"))
    # two different diagnoses outweigh a shared word
    words = "The image shows a mass", "The image shows an effusion"
    assert contradicts(finding(words[0], "a", "tumour"), finding(words[1], "b", "effusion"))
    assert not contradicts(finding(words[0], "a", None), finding(words[1], "b", "effusion"))


def test_yes_is_contradicted_by_no_alone() -> None:
    def closed(answer: str, study: str, question: str = "Is there an effusion?") -> Sample:
        return ask(question, answer, study, answer_type="closed", question_type="presence")

    one = closed("Yes, there is.", "a")
    assert contradicts(one, closed("No", "b", "Is it normal?"))
    assert not contradicts(one, closed("Yes, it is large", "b"))
    assert not contradicts(one, closed("on the left", "b"))
    assert not contradicts(closed("on the left", "b"), one)
    assert contradicts(closed("是的，有积液", "a"), closed("没有", "b"))


def test_the_options_of_a_closed_question_are_its_own() -> None:
    def closed(question: str, answer: str, study: str) -> Sample:
        return ask(question, answer, study, answer_type="closed", question_type="size")

    one = closed("Which is bigger, liver or spleen?", "liver", "a")
    assert contradicts(one, closed("which is bigger, liver or spleen", "spleen", "b"))
    assert not contradicts(one, closed("Which is bigger, kidney or bladder?", "bladder", "b"))


def test_many_attributes_are_true_at_once() -> None:
    one, two = (ask("Describe it.", answer, answer, question_type="attribute") for answer in ("cystic", "round"))
    assert not contradicts(one, two)


def test_a_wrong_answer_is_to_the_same_question_where_there_is_one() -> None:
    other = "Where is the catheter?"
    samples = [ask(WHERE, "lung", "a"), ask(other, "aorta", "b"), ask(WHERE, "liver", "c"), ask(other, "trachea", "d")]
    for seed in range(20):
        assert wrong_answers(samples, seed) == ["liver", "trachea", "lung", "aorta"]
    assert wrong_answers(samples[:2], 0) == ["aorta", "lung"]
    assert wrong_answers([samples[0], ask(WHERE, "left", "c")], 0) == [None, None]  # can be the same place


def test_a_wrong_answer_was_not_given_to_the_own_study() -> None:
    """The same was asked of study a in other words, and answered in other words."""
    samples = [
        ask("What is seen?", "opacity", "a", question_type="abnormality"),
        ask("What is wrong?", "consolidation", "a", question_type="abnormality"),
        ask("What is seen?", "consolidation", "b", question_type="abnormality"),
    ]
    assert wrong_answers(samples, 0) == [None, None, "opacity"]
    samples.append(ask("What is seen?", "fracture", "c", question_type="abnormality"))
    assert {wrong_answers(samples, seed)[0] for seed in range(20)} == {"fracture"}


def test_a_yes_or_no_is_flipped_and_what_is_no_claim_has_none() -> None:
    samples = [
        ask("Is it seen?", "Yes", "a", answer_type="closed"),
        ask("看见了吗?", "没有", "b", answer_type="closed", language="zh"),
        ask("Give the box.", "<|box:0|>", "c"),
        ask("Is it there?", "Yes, it is", "d", answer_type="closed"),
        ask("Is it gone?", "no", "e", answer_type="closed"),
    ]
    assert wrong_answers(samples, 0) == ["No", "有", None, "no", "yes"]


def test_wrong_answers_follow_the_seed_and_the_frequency() -> None:
    answers = ["liver"] * 20 + ["lung"] * 300 + ["brain"] * 100
    samples = [ask("Which organ?", answer, str(n), question_type="organ") for n, answer in enumerate(answers)]
    first = wrong_answers(samples, 0)
    assert wrong_answers(samples, 0) == first
    assert wrong_answers(samples, 1) != first
    counts = Counter(wrong for wrong, answer in zip(first, answers, strict=True) if answer == "brain")
    # lung is 300/320 of what is not brain: 93.75 +- 2.4 of a hundred draws
    assert set(counts) == {"lung", "liver"}
    assert 84 <= counts["lung"] <= 99
    rare = Counter(wrong_answers(samples, seed)[0] for seed in range(30))
    assert set(rare) == {"lung", "brain"}


def test_wrong_answers_do_not_depend_on_the_hash_seed() -> None:
    script = (
        "import json\n"
        "from medforge.config import PhantomConfig\n"
        "from medforge.convert.phantom import rows\n"
        "from medforge.models.claims import wrong_answers\n"
        "print(json.dumps(wrong_answers([s for s, _ in rows(PhantomConfig(images=12, size=56))], 3)))\n"
    )
    found = []
    for seed in ("0", "1", "2"):
        ended = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(ended.stdout))
    assert found[0] == found[1] == found[2]
    assert any(found[0])


def test_every_wrong_answer_to_a_phantom_is_wrong() -> None:
    """The drawing tells: no two of its answers to one question are true."""
    samples = [sample for sample, _ in rows(PhantomConfig(images=300, size=56))]
    wrong = wrong_answers(samples, 0)
    assert [sample.question_type for sample, answer in zip(samples, wrong, strict=True) if answer is None] == [
        "grounding" for sample in samples if sample.question_type == "grounding"
    ]
    true = {(sample.study_id, sample.question): sample.answer for sample in samples}
    said: dict[str, set[str]] = {}
    for sample, answer in zip(samples, wrong, strict=True):
        if answer is not None:
            assert answer != true[sample.study_id, sample.question]
            said.setdefault(sample.question, set()).add(answer)
    assert said["What imaging modality is this?"] == {"CT", "MRI", "X-ray"}
    assert said["How many lesions are there?"] == {"none", "one", "two", "three"}
    assert len(said[WHERE]) == 9


_ANSWERS = st.sampled_from(
    ["yes", "No.", "left", "upper left", "lung", "left lung, liver", "maybe", "有", "左肺", "..."]
)


@given(
    st.lists(
        st.builds(
            ask,
            st.sampled_from(["q1", "q2"]),
            _ANSWERS,
            st.sampled_from("abc"),
            answer_type=st.sampled_from(["open", "closed"]),
            question_type=st.sampled_from(["organ", "abnormality"]),
            target_diagnosis=st.sampled_from([None, "x", "y"]),
        ),
        max_size=12,
    ),
    st.integers(0, 9),
)
def test_a_wrong_answer_is_an_opposite_or_contradicts(samples: list[Sample], seed: int) -> None:
    for sample, answer in zip(samples, wrong_answers(samples, seed), strict=True):
        sources = [other for other in samples if other.answer == answer and contradicts(sample, other)]
        if opposite(sample.answer) is not None:
            assert answer == opposite(sample.answer)
        elif answer is not None:
            assert sources
            assert answer != sample.answer


def test_work_grows_with_the_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with its square, even where no answer fits: here every two answers share a word."""
    rng = random.Random(0)
    samples = [ask(WHERE, f"lung {rng.random()}", str(n)) for n in range(800)]
    compared = []
    for size in (200, 800):
        calls: list[bool] = []

        def counted(sample: Sample, other: Sample, calls: list[bool] = calls) -> bool:
            calls.append(contradicts(sample, other))
            return calls[-1]

        monkeypatch.setattr("medforge.models.claims.contradicts", counted)
        assert wrong_answers(samples[:size], 0) == [None] * size
        compared.append(len(calls))
    assert 0 < compared[1] < 5 * compared[0]  # the square would be 16 times


def test_a_claim_holds_the_question_and_the_proposed_answer() -> None:
    sample = ask(
        WHERE, "left", turns=(Turn("system", "Be brief."), Turn("user", f"<image>\n{WHERE}"), Turn("assistant", "left"))
    )
    assert claim(sample, " right ").turns == (
        Turn("system", "Be brief."),
        Turn("user", f"<image>\n{WHERE}\nProposed answer: right"),
    )
    chinese = ask("病变在哪里?", "左侧", language="zh")
    assert claim(chinese, "右侧").turns == (Turn("user", "<image>\n病变在哪里?\n拟议答案：右侧"),)


def test_a_claims_prompt_does_not_tell_the_answer(base: Any) -> None:
    """Two samples that differ in their answer alone give one prompt, and it ends where the answer would begin."""
    encoder = Encoder(base, 56 * 56, 512 * 512)
    images = [picture(0)]
    prompts = [encoder.encode_prompt(claim(ask(WHERE, answer), "right"), images) for answer in ("left", "right")]
    texts = [encoder.tokenizer.decode(prompt.input_ids) for prompt in prompts]
    assert texts[0] == texts[1]
    assert texts[0].endswith("Proposed answer: right<|im_end|>\n<|im_start|>assistant\n")
