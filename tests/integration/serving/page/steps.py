"""What a reader does on the page, as the tests say it."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect

from tests.integration.serving.page_server import KEY

expect.set_options(timeout=20_000)  # a machine that runs other tests beside these is slow

WIDE, NARROW, ZOOMED = {"width": 1280, "height": 800}, {"width": 360, "height": 740}, {"width": 640, "height": 400}


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
