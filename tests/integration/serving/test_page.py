"""The page in a real Chromium, against a gateway whose answers are scripted (page_server.py)."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.gateway.errors import GatewayError
from serving.gateway.settings import Settings
from tests.conftest import png
from tests.integration.serving.page_server import KEY, PageServer, abstention, answer, region
from tests.unit.gateway.conftest import Gateway, make_key, until
from tests.unit.gateway.fake import RELEASE, Fake

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
Browser, Page, expect = playwright_api.Browser, playwright_api.Page, playwright_api.expect

expect.set_options(timeout=20_000)  # a machine that runs other tests beside these is slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

WIDE, NARROW, ZOOMED = {"width": 1280, "height": 800}, {"width": 360, "height": 740}, {"width": 640, "height": 400}
_WATCH = (
    "document.addEventListener('securitypolicyviolation', (event) => console.error('CSP ' + event.violatedDirective))"
)
_MARKUP = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    with PageServer(tmp_path) as server:
        yield server


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens a URL. At the end: no violation of the policy, no script's error, no other host."""
    contexts: list[Any] = []
    urls: list[str] = []
    problems: list[str] = []

    def look(message: Any) -> None:
        # that a request was refused is what some tests want to see; Chromium writes it to the console, too
        if message.type == "error" and "Failed to load resource" not in message.text:
            problems.append(message.text)

    def watch(request: Any) -> None:
        if not request.url.startswith((*urls, "blob:", "data:")):
            problems.append(f"another host was asked: {request.url}")

    def open_it(url: str, **options: Any) -> Any:
        urls.append(f"{url}/")
        context = browser.new_context(**({"viewport": WIDE, "locale": "en-US", "reduced_motion": "reduce"} | options))
        contexts.append(context)
        context.add_init_script(_WATCH)
        opened = context.new_page()
        opened.set_default_timeout(30_000)
        opened.on("console", look)
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("request", watch)
        opened.goto(url)
        return opened

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def open_page(visit: Callable[..., Any], server: PageServer) -> Callable[..., Any]:
    """A function that opens the page of the scripted gateway."""
    return partial(visit, server.url)


def sign_in(page: Any, key: str = KEY) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#sign-in")).to_be_hidden()


def add(page: Any, *files: tuple[str, bytes]) -> None:
    """Add images through the file dialog and wait until they were read."""
    payloads = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
    page.set_input_files("#files", payloads)
    expect(page.locator("#tray .bead")).to_have_count(0)


def ask(page: Any, question: str = "What is seen?") -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    """The page, signed in, with one image of 400 × 200 pixels."""
    opened = open_page()
    sign_in(opened)
    add(opened, ("chest.png", png(1, 400, 200)))
    return opened


def card(page: Any) -> Any:
    return page.locator("#answer .card")


def drop(page: Any, *files: tuple[str, bytes]) -> None:
    """Drop files on the viewer as a browser does."""
    given = [{"name": name, "data": list(data)} for name, data in files]
    transfer = page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const {name, data} of files) transfer.items.add(new File([new Uint8Array(data)], name));
            return transfer;
        }""",
        given,
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#stage", event, {"dataTransfer": transfer})


# ---------------------------------------------------------------- signing in and out


def test_a_wrong_key_is_refused_in_words_and_a_right_one_is_kept_in_the_tab_only(open_page: Callable[..., Any]) -> None:
    page = open_page()
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("Type or paste the key first")
    field.fill("mf_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("This key is not accepted")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(page.locator("#sign-in")).to_be_visible()
    field.fill("键")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("without spaces")
    sign_in(page)
    expect(page.locator("#served")).to_have_text("tiny · release ab12ab12ab12")
    assert page.evaluate("sessionStorage.getItem('medforge-key')") == KEY
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
    assert field.input_value() == ""


def test_signing_out_clears_everything(page: Any) -> None:
    ask(page)
    expect(card(page)).to_contain_text("A nodule")
    page.get_by_role("button", name="Sign out").click()
    expect(page.locator("#sign-in")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    expect(page.locator("#tray li")).to_have_count(0)
    expect(page.locator("#history li")).to_have_count(0)
    assert "nodule" not in page.content()
    assert page.locator("#question").input_value() == ""


def test_a_reload_keeps_the_key_but_not_the_work(page: Any) -> None:
    page.reload()
    expect(page.locator("#served")).to_contain_text("tiny")
    expect(page.locator("#sign-in")).to_be_hidden()
    expect(page.locator("#tray li")).to_have_count(0)


def test_a_lost_key_is_asked_for_again_and_the_question_goes_on(page: Any, server: PageServer) -> None:
    server.keys.clear()
    server.keys.add("mf_new")
    ask(page, "Is it large?")
    expect(page.locator("#sign-in")).to_contain_text("nothing of your work is lost")
    assert server.requests == []
    sign_in(page, "mf_new")
    expect(card(page)).to_contain_text("A nodule")
    assert [one["question"] for one in server.requests] == ["Is it large?"]
    assert page.get_by_label("Question", exact=True).input_value() == "Is it large?"


# ---------------------------------------------------------------- images


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


# ---------------------------------------------------------------- asking


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


def assert_region_is_drawn_at(page: Any, box: tuple[float, float, float, float]) -> None:
    """The rectangle's edges (without its stroke) and the image's, measured at one moment."""
    drawn, image = page.evaluate(
        """() => {
            const rect = document.querySelector('#overlay .found .box');
            const {x, y, width, height} = rect.getBBox();
            const {a, d, e, f} = rect.getScreenCTM();
            const image = document.getElementById('picture').getBoundingClientRect();
            return [[x * a + e, y * d + f, (x + width) * a + e, (y + height) * d + f], image.toJSON()];
        }"""
    )
    left, top, width, height = (image[name] for name in ("x", "y", "width", "height"))
    wanted = [left + box[0] * width, top + box[1] * height, left + box[2] * width, top + box[3] * height]
    assert drawn == pytest.approx(wanted, abs=1)
    assert width / height == pytest.approx(2, rel=0.02)


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
    expect(page.locator("#history li")).to_have_count(3)
    expect(page.locator("#history")).not_to_contain_text("waiting")
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


# ---------------------------------------------------------------- feedback


def test_a_verdict_with_words_and_a_drawn_region_is_sent(page: Any, server: PageServer) -> None:
    ask(page)
    expect(card(page)).to_contain_text("A nodule")
    page.get_by_role("button", name="Send").click()
    expect(card(page)).to_contain_text("Choose one of the four first")
    page.get_by_role("radio", name="Wrong").check()
    page.get_by_label("The right answer").fill("A cyst.")
    page.get_by_role("button", name="Draw the right region").click()
    box = page.locator("#picture").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.6, steps=3)
    page.mouse.up()
    expect(page.locator("#overlay .drawn")).to_have_count(1)
    assert abs(int(page.get_by_label("Right", exact=True).input_value()) - 200) <= 1
    page.get_by_label("Right", exact=True).fill("100")
    page.get_by_role("button", name="Send").click()
    expect(card(page)).to_contain_text("Your verdict was kept")
    (verdict,) = server.verdicts
    (drawn,) = verdict.pop("regions")
    assert verdict["verdict"] == "wrong"
    assert verdict["correction"] == "A cyst."
    assert re.fullmatch("[0-9a-f]{32}", verdict["request_id"])
    assert drawn["pixels"] == pytest.approx([40, 40, 100, 120], abs=1)
    assert drawn["box"] == pytest.approx([0.1, 0.2, 0.25, 0.6], abs=0.006)


def test_a_region_is_drawn_with_two_clicks_or_with_numbers(page: Any, server: PageServer) -> None:
    ask(page)
    page.get_by_role("radio", name="Partly").check()
    page.get_by_role("button", name="Draw the right region").click()
    box = page.locator("#picture").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
    sides = [page.get_by_label(side, exact=True) for side in ("Left", "Top", "Right", "Bottom")]
    assert [int(side.input_value()) for side in sides] == pytest.approx([100, 50, 200, 100], abs=1)
    sides[0].fill("390")
    expect(card(page)).to_contain_text("Right must be more than left")
    page.get_by_role("button", name="Send").click()
    assert server.verdicts == []
    sides[2].fill("400")
    page.get_by_role("button", name="Send").click()
    expect(card(page)).to_contain_text("Your verdict was kept")
    assert server.verdicts[0]["regions"][0]["pixels"][0::2] == [390, 400]


def test_a_verdict_that_is_not_kept_is_not_lost(page: Any, server: PageServer) -> None:
    server.feedback_script.append(GatewayError(500, "internal", "The gateway failed"))
    ask(page)
    page.get_by_role("radio", name="Unsafe").check()
    page.get_by_label("The right answer").fill("Do not rely on it")
    page.get_by_role("button", name="Send").click()
    expect(card(page)).to_contain_text("Something is wrong with the server")
    expect(page.get_by_role("radio", name="Unsafe")).to_be_checked()
    expect(page.get_by_label("The right answer")).to_have_value("Do not rely on it")
    page.get_by_role("button", name="Send").click()
    expect(card(page)).to_contain_text("Your verdict was kept")


# ---------------------------------------------------------------- what must never happen


def test_markup_from_anywhere_is_shown_as_text(open_page: Callable[..., Any], server: PageServer) -> None:
    page = open_page()
    sign_in(page)
    add(page, (f"{_MARKUP}.png".replace("/", ""), png(4)))
    gate = Event()
    server.script.append([
        ("delta", {"text": _MARKUP}), gate,
        ("result", answer(answer=_MARKUP, regions=[region(label=_MARKUP)], release={
            "digest": None, "model": _MARKUP, "version": _MARKUP, "track": "candidate",
        })),
    ])  # fmt: skip
    ask(page, _MARKUP)
    expect(page.locator("#provisional-text")).to_have_text(_MARKUP)
    gate.set()
    expect(page.locator(".card > .text")).to_have_text(_MARKUP)
    expect(page.locator("#overlay text")).to_have_text(_MARKUP)
    server.script.append([GatewayError(400, _MARKUP, _MARKUP, _MARKUP)])
    ask(page, _MARKUP)
    expect(page.locator(".verdict.failed")).to_contain_text(_MARKUP)
    assert (
        page.locator("main b:has-text('bold')").evaluate_all("all => all.filter(b => b.textContent === 'bold').length")
        == 0
    )
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "MedForge"


def test_the_policy_holds_against_scripts_that_get_in_anyway(browser: Any, server: PageServer) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.evaluate(
        """() => {
            window.broken = false;
            const script = document.createElement('script');
            try { script.textContent = 'window.broken = true'; document.body.append(script); } catch (error) { }
            const button = document.createElement('button');
            button.setAttribute('type', 'button');
            try { button.setAttribute('onclick', 'window.broken = true'); } catch (error) { }
            document.body.append(button);
            button.click();
        }"""
    )
    assert page.evaluate("window.broken") is False
    elsewhere = "fetch('http://127.0.0.1:9/x').then(() => 'let out', (error) => error.message)"
    assert page.evaluate(elsewhere) != "let out"
    context.close()


# ---------------------------------------------------------------- keyboard, languages, themes, widths


def test_everything_is_done_with_the_keyboard_alone(open_page: Callable[..., Any], server: PageServer) -> None:
    page = open_page()
    focused = "document.activeElement.id || document.activeElement.textContent"

    def tab_to(name: str, presses: int = 40) -> None:
        for _ in range(presses):
            if page.evaluate(focused) == name:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{name} cannot be reached with Tab")

    page.on("filechooser", lambda _: None)  # from now on it is the test's: Playwright does not wait until that is so
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#sign-in")).to_be_hidden()
    tab_to("choose")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([{"name": "a.png", "mimeType": "image/png", "buffer": png(5, 400, 400)}])
    expect(page.locator("#caption")).to_contain_text("a.png")
    tab_to("zoom-in")
    page.keyboard.press("Enter")
    tab_to("stage")
    before = page.locator("#zoom").inner_text()
    page.keyboard.press("+")
    assert page.locator("#zoom").inner_text() != before
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => document.getElementById('stage').scrollTop > 0")
    tab_to("question")
    page.keyboard.type("What is this?")
    tab_to("submit")
    page.keyboard.press("Enter")
    expect(card(page)).to_contain_text("A nodule")
    expect(page.locator("#submit")).to_be_focused()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name || ''").startswith("verdict"):
            break
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    tab_to("Send")
    page.keyboard.press("Enter")
    expect(card(page)).to_contain_text("Partly. Your verdict was kept")
    expect(page.locator("#kept")).to_be_focused()
    assert server.verdicts[0]["verdict"] == "partly"


def test_focus_is_visible_and_every_control_has_a_name_and_a_size(page: Any) -> None:
    ask(page)
    expect(card(page)).to_contain_text("A nodule")
    page.get_by_role("button", name="Draw the right region").click()
    faults = page.evaluate(
        """() => {
            const faults = [];
            for (const one of document.querySelectorAll('button, input, select, textarea, [tabindex="0"]')) {
                if (!one.checkVisibility()) continue;
                const label = (one.labels?.[0]?.textContent || one.ariaLabel || one.textContent).trim();
                const {width, height} = (one.type === 'radio' ? one.closest('label') : one).getBoundingClientRect();
                if (!label) faults.push(`no name: ${one.outerHTML}`);
                if (width < 24 || height < 24) faults.push(`small: ${width} x ${height} ${one.outerHTML}`);
            }
            const ids = [...document.querySelectorAll('[id]')].map((one) => one.id);
            for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`twice: ${id}`);
            return faults;
        }"""
    )
    assert faults == []
    page.locator("#stage").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_interface_speaks_chinese(open_page: Callable[..., Any], server: PageServer) -> None:
    page = open_page(locale="zh-CN")
    page.get_by_label("API 密钥").fill(KEY)
    page.get_by_role("button", name="登录").click()
    expect(page.locator("#sign-in")).to_be_hidden()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    add(page, ("胸片.png", png(6)))
    expect(page.locator("#language")).to_have_value("zh")
    page.get_by_label("问题", exact=True).fill("有结节吗？")
    server.script.append([("result", abstention("undecided", "zh"))])
    page.get_by_role("button", name="提交").click()
    expect(card(page)).to_contain_text("不予回答")
    expect(card(page)).to_contain_text("无法确定该征象是否存在。")
    assert server.requests[0]["language"] == "zh"
    page.locator("#interface").select_option("en")
    expect(card(page)).to_contain_text("No answer is given")
    latin = page.locator("main, header, footer").all_inner_texts()
    assert not re.search(r"密钥|图像|回答", " ".join(latin))


def background(page: Any) -> str:
    value: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return value


def test_the_theme_follows_the_system_until_one_is_chosen(open_page: Callable[..., Any]) -> None:
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    assert background(light) == "rgb(233, 237, 240)"
    assert background(dark) == "rgb(20, 24, 28)"
    sign_in(light)
    light.locator("#theme").select_option("dark")
    assert background(light) == background(dark)
    light.reload()
    assert background(light) == background(dark)
    light.locator("#theme").select_option("auto")
    assert background(light) != background(dark)


@pytest.mark.parametrize("size", [NARROW, ZOOMED, WIDE], ids=["360 pixels", "200 %", "wide"])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_nothing_scrolls_sideways(open_page: Callable[..., Any], size: dict[str, int], locale: str) -> None:
    page = open_page(viewport=size, locale=locale)
    page.locator("#key").fill(KEY)
    page.locator("#sign-in-form .primary").click()
    expect(page.locator("#sign-in")).to_be_hidden()
    add(page, *[(f"a-rather-long-file-name-without-any-blank-{n}.png", png(n, 60, 180)) for n in range(8)])
    page.locator("#question").fill("Pneumonoultramicroscopicsilicovolcanoconiosis" * 4)
    page.locator("#submit").click()
    expect(card(page)).to_contain_text("A nodule")
    page.locator("[data-focus=draw]").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    wide = """() => [...document.querySelectorAll('.panel *, .bar *, .strip *')]
        .filter((one) => one.checkVisibility() && !one.closest('.hidden-text') && one.tagName !== 'OPTION')
        .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
        .map((one) => one.outerHTML.slice(0, 120))"""
    assert page.evaluate(wide) == []


def test_motion_is_reduced_where_the_system_asks_for_it(open_page: Callable[..., Any], server: PageServer) -> None:
    for preference, animation in (("no-preference", "breathe"), ("reduce", "none")):
        page = open_page(reduced_motion=preference)
        sign_in(page)
        add(page, ("a.png", png(1)))
        gate = Event()
        server.script.append([("status", {"stage": "waiting"}), gate, ("result", answer())])
        ask(page)
        expect(card(page)).to_contain_text("Waiting for a place")
        assert page.locator("#answer .bead").evaluate("one => getComputedStyle(one).animationName") == animation
        gate.set()
        expect(card(page)).to_contain_text("A nodule")


def test_nothing_is_kept_in_the_browser_but_key_theme_and_language(page: Any) -> None:
    ask(page, "Has Mr Miller a nodule?")
    expect(card(page)).to_contain_text("A nodule")
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    local, session, cookie = json.loads(stored)
    assert set(local) == {"medforge-theme", "medforge-interface"}
    assert set(session) == {"medforge-key"}
    assert cookie == ""
    assert page.evaluate("caches.keys()") == []
    assert page.evaluate("indexedDB.databases()") == []


# ---------------------------------------------------------------- through the gateway itself


def test_the_real_gateway_is_asked_answers_abstains_and_keeps_the_verdict(
    visit: Callable[..., Any], gateway: Gateway, key: str, fake: Fake
) -> None:
    page = visit(gateway.url)
    page.get_by_label("API key").fill("mf_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("This key is not accepted")
    sign_in(page, key)
    expect(page.locator("#served")).to_have_text("medforge · release aaaaaaaaaaaa")
    add(page, ("chest.png", png(1, 400, 200)))
    expect(page.locator("#caption")).to_contain_text("chest.png, 400 × 200 pixels")

    fake.text, fake.token_seconds = "A nodule in the left upper lobe.", 0.3
    ask(page)
    expect(page.locator("#provisional-text")).to_contain_text("A nodule")
    expect(page.locator(".card > .text")).to_have_text("A nodule in the left upper lobe.")
    expect(card(page)).to_contain_text(RELEASE)
    assert_region_is_drawn_at(page, (0.1, 0.2, 0.5, 0.6))
    page.get_by_role("radio", name="Correct").check()
    page.get_by_role("button", name="Send").click()
    expect(card(page)).to_contain_text("Your verdict was kept")
    assert gateway.metric("medforge_gateway_feedback_total", verdict="correct") == 1

    fake.match, fake.token_seconds = 0.1, 0.0
    ask(page)
    expect(card(page)).to_contain_text("No answer is given")
    expect(card(page)).to_contain_text("10 %: below the threshold of 50 %")
    expect(card(page)).not_to_contain_text("upper lobe")

    fake.token_seconds = 1.0
    ask(page)
    expect(page.locator("#provisional-text")).not_to_be_empty()
    page.get_by_role("button", name="Cancel").click()
    expect(card(page)).to_contain_text("Cancelled")
    until(lambda: fake.cancelled == 1)


def test_the_real_gateway_refuses_what_a_key_does_not_allow(
    visit: Callable[..., Any], gateway: Gateway, settings: Settings
) -> None:
    page = visit(gateway.url)
    sign_in(page, make_key(settings, "looking only", ("diagnose",)))
    add(page, ("chest.png", png(1, 40, 40)))
    ask(page)
    page.get_by_role("radio", name="Wrong").check()
    page.get_by_role("button", name="Send").click()
    expect(card(page)).to_contain_text("Your key does not allow this")
