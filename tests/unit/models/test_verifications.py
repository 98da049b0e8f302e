"""Questions whether an answer fits: half of them right, each wrong one certainly wrong, in the sample's language."""

from __future__ import annotations

import pytest

from medforge.config import PhantomConfig
from medforge.convert.phantom import rows
from medforge.models.claims import claimable, contradicts, verification, verifications, wrong_answers
from medforge.records import Turn
from tests.unit.models.test_claims import WHERE, ask

SAMPLES = [sample for sample, _ in rows(PhantomConfig(images=30, size=64)) if sample.split == "train"]


def test_each_asks_for_a_right_and_a_wrong_answer() -> None:
    found = verifications(SAMPLES, 0.5, 3)
    assert len(found) == 2 * round(0.5 * len(SAMPLES) / 2)
    assert len({sample.id for sample in found}) == len(found)
    by_id = {sample.id: sample for sample in SAMPLES}
    for right, wrong in zip(found[::2], found[1::2], strict=True):
        origin = by_id[right.id.removesuffix("-fits")]
        assert by_id[wrong.id.removesuffix("-wrong")] is origin
        assert (right.answer, wrong.answer) == ("yes", "no")
        assert right.turns[0].text == f"<image>\n{verification(origin.question, origin.answer, 'en')}"
        proposed = wrong.question.split("\n")[1].removeprefix("Proposed answer: ")
        assert proposed != origin.answer
        others = [sample for sample in SAMPLES if sample.answer == proposed]
        assert any(contradicts(origin, other) for other in others) or {proposed, origin.answer} == {"yes", "no"}
        for made in (right, wrong):
            assert (made.images, made.study_id, made.split) == (origin.images, origin.study_id, origin.split)
            assert (made.answer_type, made.question_type) == ("closed", "verification")
            assert not claimable(made)  # no claim about a claim


def test_the_draw_follows_the_seed() -> None:
    assert verifications(SAMPLES, 0.3, 1) == verifications(SAMPLES, 0.3, 1) != verifications(SAMPLES, 0.3, 2)


def test_there_are_no_more_than_wrong_answers_are_known_for() -> None:
    known = sum(answer is not None for answer in wrong_answers(SAMPLES, 0))
    assert len(verifications(SAMPLES, 2.0, 0)) == 2 * known
    lonely = ask(WHERE, "left")  # no other answer in the data contradicts it
    assert verifications([lonely], 1.0, 0) == []


def test_chinese_and_system_turns() -> None:
    one = ask("病灶在哪里？", "左上", language="zh")
    other = ask("病灶在哪里？", "右下", study="b", language="zh")
    talk = (Turn("system", "简短。"), *one.turns)
    one = ask("病灶在哪里？", "左上", language="zh", turns=talk)
    found = {sample.id: sample for sample in verifications([one, other], 2.0, 0)}
    right, wrong = found[f"{one.id}-fits"], found[f"{one.id}-wrong"]
    assert (right.answer, wrong.answer) == ("是", "否")
    assert right.turns[0] == talk[0]
    assert right.question == "病灶在哪里？\n拟议答案：左上\n拟议答案与图像相符吗？请回答是或否。"
    assert "拟议答案：右下" in wrong.question


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_gateway_asks_in_the_words_that_are_taught(language: str) -> None:
    from serving.gateway import api, prompts

    asked = api.Question.model_validate({"question": "Where is it?", "language": language})
    assert prompts.verification(asked, "here") == verification("Where is it?", "here", language)
