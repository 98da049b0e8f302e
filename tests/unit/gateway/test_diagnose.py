"""The way from a question to an answer or an abstention, with scripted upstreams."""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from serving.gateway import api
from serving.gateway.admission import Admission
from serving.gateway.answers import Capabilities, Completion, Token
from serving.gateway.balance import Track
from serving.gateway.diagnose import diagnose
from serving.gateway.errors import GatewayError
from serving.gateway.images import Picture, read_picture
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller, Context, Parts
from serving.gateway.settings import Settings

HEADS = Capabilities("medforge", "d" * 64, "chest 1", frozenset({"region", "match"}), "qwen3-vl", 3136, 1_048_576)
PLAIN = Capabilities("qwen", None, None, frozenset(), "qwen2.5-vl", None, None)
BOX = (0.1, 0.2, 0.5, 0.6)
CALLER = Caller("caller", "", "system", frozenset({"diagnose"}))
CONTEXT = Context("request-1", CALLER, math.inf)


def asked(body: dict[str, Any]) -> str:
    """The text of a request."""
    return str(body["messages"][0]["content"][-1]["text"])


def said(text: str, probability: float = 0.9, yes: float | None = None, **more: Any) -> Completion:
    """A completion of one token; `yes` is the probability of yes against no at it."""
    top = {} if yes is None else {"yes": math.log(max(yes, 1e-9)), "no": math.log(max(1 - yes, 1e-9))}
    values: dict[str, Any] = {
        "finish_reason": "stop",
        "tokens": (Token(text, top.get(text.lower(), math.log(probability)), top),) if text else (),
        "usage": api.Usage(prompt_tokens=10, completion_tokens=1, total_tokens=11),
        "region": None,
        "match": None,
        "track": "stable",
        "release": api.Release(digest="d" * 64, model="medforge"),
    }
    return Completion(text, **values | more)


def dump(value: Any) -> dict[str, Any]:
    return dict(value.model_dump())


Script = Callable[[dict[str, Any]], Completion | GatewayError]


class Upstreams:
    """Scripted answers; `bodies` are what was asked."""

    def __init__(self, can: Capabilities, script: Script, track: Track = "stable") -> None:
        self.can, self.script, self.track = can, script, track
        self.bodies: list[dict[str, Any]] = []
        self.tracks: list[Track] = []

    def choose(self, caller: Caller) -> Track:
        return self.track

    def capabilities(self, track: Track) -> Capabilities:
        return self.can

    def release(self, track: Track) -> api.Release:
        return api.Release(digest="d" * 64, model="medforge", track=track)

    async def complete(self, body: dict[str, Any], context: Context, track: Track) -> Completion:
        self.bodies.append(body)
        self.tracks.append(track)
        answer = self.script(body)
        if isinstance(answer, GatewayError):
            raise answer
        return answer

    async def stream(self, body: dict[str, Any], context: Context, track: Track) -> AsyncIterator[str | Completion]:
        answer = await self.complete(body, context, track)
        for letter in answer.text:
            yield letter
        yield answer

    @property
    def texts(self) -> list[str]:
        return [asked(body) for body in self.bodies]


class Recorder:
    """The audit log, the database's note of answers, and drift."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.answers: list[tuple[str | None, str]] = []
        self.images = 0
        self.broken = False
        self.answered = SimpleNamespace(note=lambda row: None)

    async def write(self, entry: dict[str, Any]) -> None:
        if self.broken:
            raise OSError("disk full")
        self.rows.append(entry)

    def note_image(self, statistics: Any) -> None:
        self.images += 1

    def note_answer(self, text: str | None, decision: str) -> None:
        self.answers.append((text, decision))


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


def png(size: tuple[int, int] = (100, 50)) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize(size).save(stream, "PNG")
    return stream.getvalue()


class Room:
    """Parts of scripted neighbours, and what became of a question put to them."""

    def __init__(self, settings: Settings, can: Capabilities, script: Script, track: Track = "stable") -> None:
        self.settings, self.metrics, self.kept = settings, Metrics(), Recorder()
        self.upstreams = Upstreams(can, script, track)
        self.events: list[tuple[str, Any]] = []

    def ask(self, task: api.Task, stream: bool = False, pictures: int = 1, **fields: Any) -> api.DiagnoseResponse:
        question = api.Question(task=task, **fields)
        shown = [read_picture(png(), self.settings, None, "images.0")] * pictures
        return asyncio.run(self._ask(question, shown, stream))

    async def _ask(self, question: api.Question, shown: list[Picture], stream: bool) -> api.DiagnoseResponse:
        parts = SimpleNamespace(
            settings=self.settings,
            metrics=self.metrics,
            admission=Admission(self.settings, self.metrics),
            upstreams=self.upstreams,
            database=self.kept,
            audit=self.kept,
            drift=self.kept,
        )

        async def tell(event: str, data: Any) -> None:
            self.events.append((event, data))

        return await diagnose(cast(Parts, parts), question, shown, CONTEXT, tell if stream else None)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"medforge_gateway_{name}", labels) or 0.0


def heads(limits: Settings, text: str, match: float | None = 0.9, yes: float | None = None, **more: Any) -> Room:
    """An upstream with heads that always says `text`."""
    return Room(limits, HEADS, lambda body: said(text, yes=yes, match=match, region=BOX, **more))


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


# without heads


def plain(limits: Settings, answers: dict[str, Completion], **settings: Any) -> Room:
    """An upstream without heads; `answers` by how the question begins."""

    def script(body: dict[str, Any]) -> Completion:
        return next(answer for start, answer in answers.items() if start in asked(body))

    return Room(limits.model_copy(update=settings), PLAIN, script)


JSON_BOX = '```json\n[{"bbox_2d": [28, 0, 56, 28], "label": "lesion"}]\n```'


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
    assert room.kept.answers == [("left lung", "answered")]
    assert room.metric("decisions_total", task="ask", decision="answered", track="stable") == 1
    assert room.metric("match_score_count", track="stable") == 1
    assert room.metric("confidence_count", track="stable") == 1
    assert room.metric("tokens_total", kind="prompt") == 10
    low = heads(limits, "left lung", match=0.1)
    low.ask("ask", question="Where is it?")
    assert low.metric("abstentions_total", reason="low-match", track="stable") == 1
    assert low.kept.answers == [(None, "abstained")]
    assert low.kept.rows[0]["reason"] == "low-match"


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
