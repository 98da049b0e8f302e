"""Images, questions, answers, abstentions and errors."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from serving.gateway.errors import GatewayError
from tests.conftest import png
from tests.integration.serving.page.steps import (
    NARROW,
    add,
    ask,
    assert_region_is_drawn_at,
    card,
    drop,
    sign_in,
)
from tests.integration.serving.page_server import PageServer, abstention, answer, region


def test_dropped_images_are_shown_as_the_server_reads_them(open_page: Callable[..., Any]) -> None:
    # 16 bits: the browser alone would show its upper byte, which is black; the server spreads the range that it has
    values = np.linspace(0, 255, 64 * 32).reshape(32, 64).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    page = open_page()
    sign_in(page)
    drop(page, ("dark.png", stream.getvalue()), ("b.png", png(2, 50, 60)))
    expect(page.locator("#tray li")).to_have_count(2)
    expect(page.locator("#caption")).to_have_text("Image 1 of 2: dark.png, 64 × 32 pixels")
    brightest = """() => {
        const image = document.getElementById('picture');
        const canvas = document.createElement('canvas');
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        return Math.max(...context.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 == 0));
    }"""
    assert page.evaluate(brightest) > 200


def test_pasted_image_is_added(open_page: Callable[..., Any]) -> None:
    page = open_page()
    sign_in(page)
    page.evaluate(
        """(data) => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(data)], 'pasted.png', {type: 'image/png'}));
            document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData, bubbles: true}));
        }""",
        list(png(3)),
    )
    expect(page.locator("#caption")).to_contain_text("pasted.png, 64 × 48")


def test_frames_of_a_file_are_picked_with_a_slider_and_asked_about(page: Any, server: PageServer) -> None:
    stream = io.BytesIO()
    pages = [Image.new("L", (30, 20), shade) for shade in (10, 120, 240)]
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    page.get_by_role("button", name="Remove image 1").click()
    add(page, ("stack.tif", stream.getvalue()))
    slider = page.get_by_label("Frame")
    expect(page.locator("#frame-number")).to_have_text("2 of 3")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#caption")).to_contain_text("frame 3 of 3")
    ask(page)
    expect(card(page)).to_contain_text("A nodule")
    assert server.requests[0]["images"][0]["frame"] == 2
    expect(page.locator("#caption")).to_contain_text("of the answer: stack.tif, 30 × 20 pixels, frame 3 of 3")


def test_dicom_is_shown(open_page: Callable[..., Any]) -> None:
    data = pytest.importorskip("pydicom.data")
    path = data.get_testdata_file("CT_small.dcm", download=False)
    page = open_page()
    sign_in(page)
    add(page, ("CT_small", Path(path).read_bytes()))
    expect(page.locator("#caption")).to_have_text("Image 1 of 1: CT_small, 128 × 128 pixels")


def test_what_is_no_image_is_said_and_not_sent(page: Any, server: PageServer) -> None:
    add(page, ("letter.txt", b"no image at all"))
    expect(page.locator("#nothing")).to_contain_text("letter.txt: could not be read")
    expect(page.locator("#nothing")).to_contain_text("Request ")
    ask(page)
    expect(page.locator("#ask-problem")).to_contain_text("Remove it")
    page.get_by_role("button", name="Remove image 2").click()
    ask(page)
    expect(card(page)).to_contain_text("A nodule")
    assert len(server.requests) == 1


def test_the_answer_streams_as_provisional_and_ends_with_its_release(page: Any, server: PageServer) -> None:
    seen, whole = Event(), Event()
    server.script.append([
        ("status", {"stage": "locating"}),
        ("delta", {"text": "A no", "provisional": True}),
        seen,
        ("delta", {"text": "dule", "provisional": True}),
        whole,
        ("result", answer()),
    ])  # fmt: skip
    ask(page)
    expect(page.locator("#provisional-text")).to_have_text("A no")
    expect(page.locator("#provisional")).to_contain_text("not checked yet")
    expect(card(page)).to_contain_text("Locating the region")
    seen.set()
    expect(page.locator("#provisional-text")).to_have_text("A nodule")
    whole.set()
    expect(page.locator("#provisional")).to_have_count(0)
    expect(card(page)).to_contain_text("A nodule in the left upper lobe.")
    expect(card(page)).to_contain_text("ab12" * 16)
    expect(card(page)).to_contain_text("Not for diagnostic use without review by a qualified person.")
    meter = page.get_by_role("meter", name="Fit of region and text")
    expect(meter).to_have_attribute("aria-valuetext", "93 %: reaches the threshold of 50 %")
    expect(page.locator("#announcer")).to_contain_text("Answer: A nodule in the left upper lobe.")
    assert [one["question"] for one in server.requests] == ["What is seen?"]


def test_nothing_is_announced_while_the_answer_streams(page: Any, server: PageServer) -> None:
    server.script.append([*[("delta", {"text": f"word{n} "}) for n in range(20)], ("result", answer())])
    page.evaluate(
        """() => {
            window.said = [];
            new MutationObserver(() => said.push(document.getElementById('announcer').textContent))
                .observe(document.getElementById('announcer'), {childList: true});
        }"""
    )
    ask(page)
    expect(card(page)).to_contain_text("A nodule")
    assert page.evaluate("said") == [
        "Asking.",
        "Answer: A nodule in the left upper lobe. The region is marked on the image.",
    ]
    assert page.locator("#answer [aria-live], #answer [role=status]").count() == 0


def test_the_region_is_at_the_right_pixels_at_every_zoom(page: Any, server: PageServer) -> None:
    box = (0.25, 0.5, 0.75, 0.875)
    ask(page)
    expect(page.locator("#overlay .found")).to_have_count(1)
    fitted = page.locator("#picture").bounding_box()
    assert fitted["width"] / fitted["height"] == pytest.approx(2, rel=0.01)
    assert_region_is_drawn_at(page, box)
    for _ in range(4):
        page.get_by_role("button", name="Zoom in (+)").click()
    grown = page.locator("#picture").bounding_box()
    assert grown["width"] == pytest.approx(fitted["width"] * 1.25**4, rel=0.01)
    assert_region_is_drawn_at(page, box)
    page.locator("#stage").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("-")
    assert_region_is_drawn_at(page, box)
    page.keyboard.press("1")
    assert page.locator("#picture").bounding_box()["width"] == 400
    assert_region_is_drawn_at(page, box)
    page.keyboard.press("0")
    assert page.locator("#picture").bounding_box() == pytest.approx(fitted)
    page.set_viewport_size(NARROW)
    assert_region_is_drawn_at(page, box)


def test_wheel_zooms_about_the_pointer_and_dragging_pans(page: Any) -> None:
    before = page.locator("#picture").bounding_box()
    x, y = before["x"] + before["width"] * 0.75, before["y"] + before["height"] * 0.5
    page.mouse.move(x, y)
    for _ in range(4):
        page.mouse.wheel(0, -200)
    page.wait_for_function("(width) => document.getElementById('picture').width > width * 6", arg=before["width"])
    after = page.locator("#picture").bounding_box()
    assert after["x"] + after["width"] * 0.75 == pytest.approx(x, abs=3)
    # until the image is higher than the stage it stands in the middle, which the scroll bar moves by half its height
    assert after["y"] + after["height"] * 0.5 == pytest.approx(y, abs=8)
    page.mouse.down()
    page.mouse.move(x - 60, y - 30)
    page.mouse.up()
    moved = page.locator("#picture").bounding_box()
    assert (moved["x"] - after["x"], moved["y"] - after["y"]) == pytest.approx((-60, -30), abs=2)


def test_regions_can_be_hidden(page: Any) -> None:
    ask(page)
    expect(page.locator("#overlay .box")).to_have_count(1)
    button = page.get_by_role("button", name="Regions", exact=True)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#overlay .box")).to_have_count(0)
    page.get_by_role("button", name="Show nodule on image 1").click()
    expect(page.locator("#overlay .box")).to_have_count(1)


@pytest.mark.parametrize(
    "reason", ["no-region", "low-match", "low-confidence", "model-refused", "undecided", "unreadable"]
)
def test_an_abstention_is_said_with_its_reason_and_takes_the_provisional_text_away(
    page: Any, server: PageServer, reason: Any
) -> None:
    server.script.append([("delta", {"text": "SECRET", "provisional": True}), ("result", abstention(reason))])
    ask(page)
    expect(card(page)).to_contain_text("No answer is given")
    expect(card(page)).to_contain_text(abstention(reason)["reason_text"])
    expect(card(page)).not_to_contain_text("SECRET")
    assert len(page.locator(".verdict.abstained p").all_inner_texts()) == 2, "the reason, and what the reader can do"
    # 0.4999 must not look as if it reached 50 %
    expect(card(page)).to_contain_text("49 %: below the threshold of 50 %")
    expect(page.locator("#announcer")).to_contain_text("No answer is given.")
    expect(page.locator("#overlay .box")).to_have_count(0)


def test_regions_of_a_withheld_answer_are_marked_as_not_verified(page: Any, server: PageServer) -> None:
    server.script.append([("result", abstention("low-match", regions=[region()]))])
    ask(page)
    expect(page.locator("#overlay .doubtful text")).to_have_text("nodule (not verified)")
    expect(page.locator(".places")).to_contain_text("nodule (not verified)")


def test_tasks_send_what_they_need_and_say_what_is_missing(page: Any, server: PageServer) -> None:
    for label, task in (("Ask", "ask"), ("Finding", "finding"), ("Locate", "locate")):
        page.get_by_role("radio", name=label).check()
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#ask-problem")).not_to_be_empty()
        field = page.locator("#question" if task == "ask" else "#finding")
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
    assert server.requests == []
    finding = {"name": "effusion", "present": False, "probability": 0.07}
    server.script.append([("result", answer(task="finding", finding=finding, answer="no", regions=[]))])
    page.get_by_role("radio", name="Finding").check()
    page.locator("#finding").fill("effusion")
    page.locator("#language").select_option("zh")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(card(page)).to_contain_text("Not present: effusion")
    expect(card(page)).to_contain_text("7 %")
    page.get_by_role("radio", name="Report").check()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#history li")).to_have_count(2)
    expect(card(page)).to_contain_text("A nodule")
    kept = [{name: value for name, value in one.items() if name != "images"} for one in server.requests]
    asked = {"task": "finding", "finding": "effusion", "language": "zh"}
    assert kept == [asked, {"task": "report", "language": "zh"}]


def test_several_images_are_a_study_or_a_batch(page: Any, server: PageServer) -> None:
    add(page, ("second.png", png(2, 100, 100)))
    expect(page.locator("#sending")).to_have_text("1 request with 2 images")
    server.script.append([("result", answer(regions=[region(image=1)]))])
    ask(page)
    expect(page.locator("#caption")).to_contain_text("Image 2 of 2 of the answer: second.png")
    assert [len(one["images"]) for one in server.requests] == [2]
    page.get_by_label("separate").check()
    expect(page.locator("#sending")).to_have_text("2 requests")
    ask(page, "Each?")
    expect(page.locator("#history li").filter(has_text="answered")).to_have_count(3)
    expect(page.locator("#caption")).to_contain_text("second.png")
    assert [len(one["images"]) for one in server.requests] == [2, 1, 1]
    assert server.requests[1]["images"] != server.requests[2]["images"]
    page.locator("#history button").nth(2).click()
    expect(page.locator("#answer .asked")).to_have_text("What is seen?")


def test_an_error_is_said_in_plain_words_with_the_request(page: Any, server: PageServer) -> None:
    server.script.append([GatewayError(502, "upstream-garbled", "The model's server gave no answer that can be read")])
    ask(page)
    expect(card(page)).to_contain_text("The model's server gave no usable answer")
    expect(card(page)).to_contain_text(re.compile("Request [0-9a-f]{32}"))
    page.get_by_role("button", name="Ask again").click()
    expect(card(page)).to_contain_text("A nodule")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [("delta", {"text": "half"}), GatewayError(400, "image-frame", "has 1 frame", "images.0")],
            "images.0: has 1 frame",
        ),
        ([("delta", {"text": "half"}), None], "The answer broke off"),
        ([("delta", {"text": "half"})], "The answer broke off"),
    ],
)
def test_an_answer_that_fails_on_its_way_is_never_left_half(
    page: Any, server: PageServer, steps: list[Any], words: str
) -> None:
    server.script.append(steps)
    ask(page)
    expect(card(page)).to_contain_text(words)
    expect(card(page)).not_to_contain_text("half")
    expect(page.locator("#cancel")).to_be_disabled()


def test_a_server_that_is_away_is_said(page: Any, server: PageServer) -> None:
    page.route("**/v1/diagnose", lambda route: route.abort("connectionrefused"))
    ask(page)
    expect(card(page)).to_contain_text("The server cannot be reached")


def test_cancel_hangs_up(page: Any, server: PageServer) -> None:
    server.script.append([("delta", {"text": "a"}), Event(), ("result", answer())])
    ask(page)
    expect(page.locator("#provisional-text")).to_contain_text("a")
    page.get_by_role("button", name="Cancel").click()
    expect(card(page)).to_contain_text("Cancelled")
    assert server.hung_up.wait(20)
    ask(page)
    expect(card(page)).to_contain_text("A nodule")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_after_a_countdown(page: Any, server: PageServer, status: int) -> None:
    server.script.append([GatewayError(status, "busy", "Too many at once", retry_after=3)])
    ask(page)
    expect(card(page)).to_contain_text(re.compile("again in [123] s"))
    expect(card(page)).to_contain_text("A nodule")
    assert len(server.requests) == 2


def test_a_countdown_can_be_cancelled(page: Any, server: PageServer) -> None:
    server.script.append([GatewayError(503, "busy", "Too many at once", retry_after=60)])
    ask(page)
    expect(card(page)).to_contain_text("again in")
    page.get_by_role("button", name="Cancel").click()
    expect(card(page)).to_contain_text("Cancelled")
    assert len(server.requests) == 1
