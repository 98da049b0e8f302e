"""The page in a real Chromium, against a gateway whose answers are scripted (page_server.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from tests.conftest import png
from tests.integration.serving.page.steps import WIDE, add, sign_in
from tests.integration.serving.page_server import PageServer

_WATCH = (
    "document.addEventListener('securitypolicyviolation', (event) => console.error('CSP ' + event.violatedDirective))"
)


@pytest.fixture(scope="module")  # its event loop must not run while other tests start theirs
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
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


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    """The page, signed in, with one image of 400 × 200 pixels."""
    opened = open_page()
    sign_in(opened)
    add(opened, ("chest.png", png(1, 400, 200)))
    return opened
