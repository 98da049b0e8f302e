"""Keyboard, screen readers, languages, themes, widths."""

from __future__ import annotations

import re
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from serving.gateway.errors import GatewayError
from tests.conftest import png
from tests.integration.serving.page.steps import (
    NARROW,
    WIDE,
    ZOOMED,
    add,
    ask,
    card,
    sign_in,
)
from tests.integration.serving.page_server import KEY, PageServer, abstention, answer


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


def faults(page: Any) -> list[str]:
    """What axe-core finds by its rules of WCAG 2.2, levels A and AA, and its own best practices."""
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = Axe().run(page, options={"runOnly": rules}).response
    assert len(found["passes"]) > 15  # the rules were applied to something
    return [f"{rule['id']}: {node['html'][:160]}" for rule in found["violations"] for node in rule["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page: Callable[..., Any], server: PageServer, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    found = {"signing in": faults(page)}
    sign_in(page)
    found["empty"] = faults(page)
    add(page, ("chest.png", png(1, 400, 200)))
    gate = Event()
    server.script += [
        [("delta", {"text": "A nodule"}), gate, ("result", answer())],
        [("result", abstention())],
        [GatewayError(400, "invalid", "What is wrong")],
    ]
    ask(page)
    expect(page.locator("#provisional-text")).to_contain_text("A nodule")
    found["streaming"] = faults(page)
    gate.set()
    page.get_by_role("button", name="Draw the right region").click()
    found["answered, drawing"] = faults(page)
    page.keyboard.press("Escape")
    ask(page)
    expect(card(page)).to_contain_text("No answer is given")
    found["abstained"] = faults(page)
    ask(page)
    expect(page.locator(".verdict.failed")).to_contain_text("What is wrong")
    found["failed"] = faults(page)
    assert {state: said for state, said in found.items() if said} == {}
