"""What must never happen: markup from anywhere is run, something leaves the page."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Any

from playwright.sync_api import expect

from serving.gateway.errors import GatewayError
from tests.conftest import png
from tests.integration.serving.page.steps import (
    add,
    ask,
    sign_in,
)
from tests.integration.serving.page_server import PageServer, answer, region

_MARKUP = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"


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
