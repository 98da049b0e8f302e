"""A reader's verdict; and the page before the real gateway."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from serving.gateway.errors import GatewayError
from serving.gateway.settings import Settings
from tests.conftest import png
from tests.integration.serving.page.steps import (
    add,
    ask,
    assert_region_is_drawn_at,
    card,
    sign_in,
)
from tests.integration.serving.page_server import PageServer
from tests.unit.gateway.conftest import Gateway, make_key, until
from tests.unit.gateway.fake import RELEASE, Fake


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
