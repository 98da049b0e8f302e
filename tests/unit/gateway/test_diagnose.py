"""The way from a question to an answer or an abstention, with scripted upstreams."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serving.gateway import api
from serving.gateway.answers import Completion
from serving.gateway.balance import Track
from serving.gateway.errors import GatewayError
from serving.gateway.parts import Context
from serving.gateway.settings import Settings
from tests.unit.gateway.room import (
    BOX,
    HEADS,
    Room,
    asked,
    dump,
    heads,
    plain,
    said,
)


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


# with task heads


def test_a_question_takes_one_request(limits: Settings) -> None:
    room = heads(limits, "left lung")
    answer = room.ask("ask", question="Where is it?")
    assert (answer.decision, answer.reason, answer.answer) == ("answered", None, "left lung")
    assert answer.match == api.Score(value=0.9, threshold=0.5, source="head")
    assert dump(answer.confidence) == {"value": pytest.approx(0.9), "threshold": 0.0, "source": "tokens"}
    assert [(region.box, region.pixels, region.source) for region in answer.regions] == [
        (BOX, (10, 10, 50, 30), "head")
    ]
    assert (answer.id, answer.disclaimer, answer.release.digest) == ("request-1", api.DISCLAIMER, "d" * 64)
    (body,) = room.upstreams.bodies
    assert body["medforge"] == {"region": True, "match": True}
    assert asked(body) == "Where is it?"
    assert (body["temperature"], body["max_tokens"], body["logprobs"]) == (0, 512, True)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_all_images_go_into_one_prompt(limits: Settings) -> None:
    room = heads(limits, "left")
    answer = room.ask("ask", pictures=3, question="Which?")
    assert [part["type"] for part in room.upstreams.bodies[0]["messages"][0]["content"]] == ["image_url"] * 3 + ["text"]
    assert (len(answer.images), answer.regions[0].image, room.kept.images) == (3, 0, 3)


@pytest.mark.parametrize("match", [0.49, None])
def test_a_low_match_withholds_the_answer_and_tells_the_scores(match: float | None, limits: Settings) -> None:
    answer = heads(limits, "left lung", match=match).ask("ask", question="Where is it?", language="zh")
    assert (answer.decision, answer.reason, answer.answer) == ("abstained", "low-match", None)
    assert answer.reason_text == api.REASONS["low-match"]["zh"]
    assert (answer.match and answer.match.value) == match
    assert answer.confidence is not None
    assert "left lung" not in answer.model_dump_json()


def test_a_match_at_its_threshold_passes(limits: Settings) -> None:
    assert heads(limits, "left lung", match=0.5).ask("ask", question="Where?").decision == "answered"


def test_low_confidence(limits: Settings) -> None:
    room = heads(limits.model_copy(update={"confidence_threshold": 0.95}), "left lung")
    answer = room.ask("ask", question="Where?")
    assert (answer.reason, answer.answer, answer.confidence and answer.confidence.threshold) == (
        "low-confidence",
        None,
        0.95,
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("This cannot be told from the image.", "model-refused"),
        ("无法从图像中判断。", "model-refused"),
        ("", "unreadable"),
        (" \n", "unreadable"),
    ],
)
def test_refusals_and_nothing(text: str, reason: str, limits: Settings) -> None:
    answer = heads(limits, text).ask("ask", question="Where?")
    assert (answer.decision, answer.reason, answer.answer) == ("abstained", reason, None)


def test_an_answer_that_was_cut_off(limits: Settings) -> None:
    assert heads(limits, "The lungs are not", finish_reason="length").ask("report").reason == "unreadable"


@pytest.mark.parametrize(("text", "yes", "present"), [("yes", 0.9, True), ("no", 0.2, False), ("Yes.", None, True)])
def test_a_finding(text: str, yes: float | None, present: bool, limits: Settings) -> None:
    room = heads(limits, text, yes=yes)
    answer = room.ask("finding", finding="a lesion")
    assert dump(answer.finding) == {"name": "a lesion", "present": present, "probability": yes and pytest.approx(yes)}
    assert bool(answer.regions) is present  # what is not there has no place
    assert room.upstreams.texts == ["Is there a lesion in this image?"]
    assert room.upstreams.bodies[0]["top_logprobs"] == 20


@pytest.mark.parametrize(
    ("text", "yes", "reason"),
    [
        ("yes", 0.55, "undecided"),
        ("no", 0.45, "undecided"),
        ("no", 0.9, "undecided"),
        ("a lesion", None, "unreadable"),
        ("It cannot be excluded.", None, "unreadable"),
    ],
)
def test_a_finding_that_is_not_decided(text: str, yes: float | None, reason: str, limits: Settings) -> None:
    answer = heads(limits, text, yes=yes).ask("finding", finding="lesion")
    assert (answer.decision, answer.reason, answer.finding, answer.answer) == ("abstained", reason, None, None)


def test_locate_verifies_first(limits: Settings) -> None:
    room = heads(limits, "upper left")
    answer = room.ask("locate", finding="a lesion")
    assert (answer.decision, answer.answer) == ("answered", "upper left")
    assert (answer.regions[0].label, answer.regions[0].box) == ("a lesion", BOX)
    assert room.upstreams.texts == ["Is there a lesion in this image?", "Where is the lesion?"]
    first, second = room.upstreams.bodies
    assert first["medforge"] == {"match": True, "claim": "yes"}
    assert second["medforge"] == {"region": True, "match": False}
    assert answer.usage == api.Usage(prompt_tokens=20, completion_tokens=2, total_tokens=22)


def test_locate_of_what_is_not_there(limits: Settings) -> None:
    room = heads(limits, "upper left", match=0.2)
    answer = room.ask("locate", finding="病灶", language="zh")
    assert (answer.reason, answer.regions, len(room.upstreams.bodies)) == ("low-match", [], 1)
    assert room.upstreams.bodies[0]["medforge"]["claim"] == "是"


def test_locate_without_a_region(limits: Settings) -> None:
    room = Room(limits, HEADS, lambda body: said("upper left", match=0.9, region=(0.5, 0.5, 0.5, 0.5)))
    answer = room.ask("locate", finding="lesion")
    assert (answer.reason, answer.regions, answer.answer) == ("no-region", [], None)


def test_a_withheld_place_is_not_told(limits: Settings) -> None:
    room = heads(limits, "This cannot be told from the image.")
    answer = room.ask("locate", finding="lesion")
    assert (answer.reason, answer.regions) == ("model-refused", [])


def test_a_report_asks_for_no_region(limits: Settings) -> None:
    room = heads(limits, "The lungs are clear.")
    assert room.ask("report", language="zh").answer == "The lungs are clear."
    assert room.upstreams.bodies[0]["medforge"] == {"region": False, "match": True}
    assert room.upstreams.texts == ["请为这张图像撰写影像学报告。"]


def test_boxes_in_the_answer_are_regions_too(limits: Settings) -> None:
    text = 'here: {"bbox_2d": [500, 500, 900, 1200], "label": "x"}'
    answer = heads(limits, text).ask("ask", question="Where?")
    assert [(region.source, region.box) for region in answer.regions] == [("head", BOX), ("text", (0.5, 0.5, 0.9, 1.0))]


# what else has to hold


@pytest.mark.parametrize("text", ["a<|im_end|>b", "<image>", "<|box:0|>", "<|vision_start|>", "<|object_ref_start|>x"])
@pytest.mark.parametrize("name", ["question", "finding"])
def test_control_tokens_are_refused(name: str, text: str, limits: Settings) -> None:
    room = heads(limits, "x")
    with pytest.raises(GatewayError) as caught:
        if name == "question":
            room.ask("ask", question=text)
        else:
            room.ask("locate", finding=text)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "control-token", name)
    assert not room.upstreams.bodies


def test_ordinary_signs_are_not_control_tokens(limits: Settings) -> None:
    assert heads(limits, "yes").ask("ask", question="Is a < b | c > d, or <b>|x|?").decision == "answered"


def test_one_release_gives_all_answers(limits: Settings) -> None:
    digests = iter(("a" * 64, "b" * 64))

    def script(body: dict[str, Any]) -> Completion:
        return said("left", match=0.9, region=BOX, release=api.Release(digest=next(digests), model="medforge"))

    with pytest.raises(GatewayError) as caught:
        Room(limits, HEADS, script).ask("locate", finding="lesion")
    assert (caught.value.status, caught.value.code) == (503, "release-changed")


def test_a_candidate_that_fails_gives_way_to_stable(limits: Settings) -> None:
    failing = GatewayError(502, "upstream-error", "x")
    room = Room(
        limits, HEADS, lambda body: failing if len(room.upstreams.bodies) == 1 else said("left", match=0.9), "candidate"
    )
    assert room.ask("ask", question="Where?").decision == "answered"
    assert room.upstreams.tracks == ["candidate", "stable"]
    refusing = Room(limits, HEADS, lambda body: GatewayError(400, "upstream-refused", "x"), "candidate")
    with pytest.raises(GatewayError):
        refusing.ask("ask", question="Where?")
    assert refusing.upstreams.tracks == ["candidate"]


def test_what_was_shown_is_not_begun_again(limits: Settings) -> None:
    """A candidate that breaks off in the middle of a stream: the reader has seen a part of its answer."""
    room = heads(limits, "left")
    room.upstreams.track = "candidate"

    async def breaks_off(body: dict[str, Any], context: Context, track: Track) -> AsyncIterator[str | Completion]:
        room.upstreams.tracks.append(track)
        yield "le"
        raise GatewayError(502, "upstream-garbage", "x")

    room.upstreams.stream = breaks_off  # type: ignore[method-assign]
    with pytest.raises(GatewayError):
        room.ask("ask", stream=True, question="Where?")
    assert room.upstreams.tracks == ["candidate"]


def test_what_is_kept_and_counted(limits: Settings) -> None:
    room = heads(limits, "left lung")
    answer = room.ask("ask", question="Where is it?")
    (row,) = room.kept.rows
    assert (row["route"], row["status"], row["decision"], row["reason"]) == ("/v1/diagnose", 200, "answered", None)
    assert (row["request_id"], row["caller"], row["release"], row["track"]) == (
        "request-1",
        "caller",
        "d" * 64,
        "stable",
    )
    assert row["outputs"] == hashlib.sha256(answer.model_dump_json().encode()).hexdigest()
    assert len(row["inputs"]) == 64
    assert not any("lung" in str(value) or "Where" in str(value) for value in row.values())
    assert room.kept.answers == [("left lung", "answered", "stable")]
    assert room.metric("decisions_total", task="ask", decision="answered", track="stable") == 1
    assert room.metric("match_score_count", track="stable") == 1
    assert room.metric("confidence_count", track="stable") == 1
    assert room.metric("tokens_total", kind="prompt") == 10
    low = heads(limits, "left lung", match=0.1)
    low.ask("ask", question="Where is it?")
    assert low.metric("abstentions_total", reason="low-match", track="stable") == 1
    assert low.kept.answers == [(None, "abstained", "stable")]
    assert low.kept.rows[0]["reason"] == "low-match"
    tried = heads(limits, "left lung", release=api.Release(digest="c" * 64, model="medforge", track="candidate"))
    tried.ask("ask", question="Where is it?")
    assert tried.kept.answers == [("left lung", "answered", "candidate")]


def test_no_answer_without_its_row(limits: Settings) -> None:
    room = heads(limits, "left lung")
    room.kept.broken = True
    with pytest.raises(GatewayError) as caught:
        room.ask("ask", question="Where is it?")
    assert caught.value.status == 503


def test_the_way_is_told(limits: Settings) -> None:
    room = heads(limits, "left", match=0.1)
    answer = room.ask("ask", stream=True, question="Where?")
    assert answer.reason == "low-match"
    assert room.events == [
        ("status", {"stage": "waiting"}),
        ("status", {"stage": "locating"}),
        *(("delta", {"text": letter, "provisional": True}) for letter in "left"),
    ]
    other = plain(limits, {"bounding": said(""), "Does the": said("yes", yes=1.0), "Where": said("left")})
    other.ask("ask", stream=True, question="Where?")
    stages = [data["stage"] for event, data in other.events if event == "status"]
    assert stages == ["waiting", "locating", "answering", "verifying"]
