"""Signing in and out, and what the browser keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

from tests.integration.serving.page.steps import (
    ask,
    card,
    sign_in,
)
from tests.integration.serving.page_server import KEY, PageServer


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
