"""The same route where the upstream has no heads: boxes in its text, and its own word on whether they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving.gateway.answers import Capabilities, Completion, Token
from serving.gateway.settings import Settings
from tests.unit.gateway.room import (
    BOX,
    JSON_BOX,
    Room,
    asked,
    dump,
    plain,
    said,
)


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


def test_a_question_is_grounded_answered_and_asked_back(limits: Settings) -> None:
    room = plain(
        limits,
        {
            "bounding box": said(JSON_BOX),
            "Does the proposed answer fit": said("yes", yes=0.8),
            "Where": said("left lung"),
        },
    )
    answer = room.ask("ask", question="Where is it?")
    assert (answer.decision, answer.answer) == ("answered", "left lung")
    assert dump(answer.match) == {"value": pytest.approx(0.8), "threshold": 0.5, "source": "question"}
    # 100 x 50 is seen as 112 x 56 by Qwen2.5-VL
    assert [(region.source, region.box) for region in answer.regions] == [("text", (0.25, 0.0, 0.5, 0.5))]
    assert room.upstreams.texts == [
        "Give the bounding box of the region that this question is about: Where is it?",
        "Where is it?",
        "Where is it?\nProposed answer: left lung\nDoes the proposed answer fit the image? Answer yes or no.",
    ]
    assert all("medforge" not in body for body in room.upstreams.bodies)
    assert answer.usage.total_tokens == 33


def test_asked_back_in_chinese(limits: Settings) -> None:
    room = plain(
        limits,
        {
            "边界框": said("没有"),
            "拟议答案": said("是", tokens=(Token("是", -0.1, {"是": -0.1, "否": -3.0}),)),
            "哪": said("左肺"),
        },
    )
    answer = room.ask("ask", question="病灶在哪里？", language="zh")
    assert (answer.decision, answer.regions) == ("answered", [])
    assert room.upstreams.texts[-1] == "病灶在哪里？\n拟议答案：左肺\n拟议答案与图像相符吗？请回答是或否。"


@pytest.mark.parametrize("reply", [said("no", yes=0.3), said("perhaps"), said("yes", tokens=())])
def test_asked_back_and_not_affirmed(reply: Completion, limits: Settings) -> None:
    """Also where it does not say yes or no, or gives no probabilities: what is not verified is withheld."""
    room = plain(limits, {"bounding box": said(""), "Does the proposed": reply, "Where": said("left lung")})
    answer = room.ask("ask", question="Where is it?")
    assert (answer.decision, answer.reason) == ("abstained", "low-match")


def test_no_verification_is_needed_where_the_threshold_is_0(limits: Settings) -> None:
    answers = {"bounding box": said(""), "Does the proposed": said("perhaps"), "Where": said("left lung")}
    assert plain(limits, answers, match_threshold=0.0).ask("ask", question="Where?").decision == "answered"


def test_a_refusal_is_not_asked_back(limits: Settings) -> None:
    room = plain(limits, {"bounding box": said(""), "Where": said("I cannot tell.")})
    assert room.ask("ask", question="Where?").reason == "model-refused"
    assert len(room.upstreams.bodies) == 2


def test_control_tokens_in_an_answer_are_not_asked_back(limits: Settings) -> None:
    room = plain(
        limits,
        {
            "bounding box": said(""),
            "Does the proposed": said("yes", yes=0.9),
            "Where": said("<|object_ref_start|>lesion<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"),
        },
    )
    room.ask("ask", question="Where?")
    assert "Proposed answer: lesion(1,2),(3,4)\n" in room.upstreams.texts[-1]


def test_a_finding_without_heads(limits: Settings) -> None:
    room = plain(
        limits,
        {
            "bounding box": said(JSON_BOX),
            "Does the proposed": said("yes", yes=0.9),
            "Is there": said("yes", yes=0.95),
        },
    )
    answer = room.ask("finding", finding="a lesion")
    assert dump(answer.finding) == {"name": "a lesion", "present": True, "probability": pytest.approx(0.95)}
    assert len(answer.regions) == 1
    assert room.upstreams.texts[:2] == [
        "Give the bounding box of the lesion.",
        "Is there a lesion in this image? Answer yes or no.",
    ]


def test_locate_without_heads(limits: Settings) -> None:
    answers = {
        "bounding box": said(JSON_BOX),
        "Is there": said("yes", yes=0.9),
        "Where": said("upper left"),
    }
    answer = plain(limits, answers).ask("locate", finding="lesion")
    assert (answer.decision, answer.answer, len(answer.regions)) == ("answered", "upper left", 1)
    assert dump(answer.match) == {"value": pytest.approx(0.9), "threshold": 0.5, "source": "question"}
    absent = plain(limits, answers | {"Is there": said("no", yes=0.1)})
    assert (absent.ask("locate", finding="lesion").reason, len(absent.upstreams.bodies)) == ("low-match", 1)
    nowhere = plain(limits, answers | {"bounding box": said("I see none.")})
    assert (nowhere.ask("locate", finding="lesion").reason, len(nowhere.upstreams.bodies)) == ("no-region", 2)


def test_a_report_without_heads_is_not_located(limits: Settings) -> None:
    room = plain(limits, {"Does the proposed": said("yes", yes=0.9), "report": said("Clear lungs.")})
    assert room.ask("report").decision == "answered"
    assert len(room.upstreams.bodies) == 2


@pytest.mark.parametrize("head", ["region", "match"])
def test_one_head_alone(head: str, limits: Settings) -> None:
    can = Capabilities("medforge", "d" * 64, None, frozenset({head}), "qwen3-vl")

    def script(body: dict[str, Any]) -> Completion:
        told = body.get("medforge", {})
        if "bounding box" in asked(body):
            return said('{"bbox_2d": [100, 100, 200, 200]}')
        if "Does the proposed" in asked(body):
            return said("yes", yes=0.7)
        return said("left", region=BOX if told.get("region") else None, match=0.8 if told.get("match") else None)

    room = Room(limits, can, script)
    answer = room.ask("ask", question="Where?")
    assert answer.regions[0].source == ("head" if head == "region" else "text")
    assert answer.match
    assert answer.match.source == ("head" if head == "match" else "question")
    assert len(room.upstreams.bodies) == 2
