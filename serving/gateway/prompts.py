"""What a model is asked, in the words of its training data (see `medforge.convert`), in English and Chinese."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

from medforge.models import claims
from medforge.models.encode import CONTROL
from medforge.records import BOX_MARK, IMAGE_MARK
from serving.gateway import api
from serving.gateway.errors import bad_request
from serving.gateway.images import Picture

Content = list[dict[str, Any]]

# every control token of the families is of this form, those of boxes and tools too
_MARK = re.compile(r"<\|[^\s<>|]{1,60}\|>")
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)

_REPORT: dict[api.Language, str] = {
    "en": "Write a radiology report of this image.",
    "zh": "请为这张图像撰写影像学报告。",
}
_PRESENT: dict[api.Language, str] = {"en": "Is there {} in this image?", "zh": "图像中是否存在{}？"}
_WHERE: dict[api.Language, str] = {"en": "Where is the {}?", "zh": "{}在哪里？"}
_BOX: dict[api.Language, str] = {"en": "Give the bounding box of the {}.", "zh": "给出{}的边界框。"}
_ABOUT: dict[api.Language, str] = {
    "en": "Give the bounding box of the region that this question is about: {}",
    "zh": "给出下面的问题所涉及区域的边界框：{}",
}
_CLOSED: dict[api.Language, str] = {"en": " Answer yes or no.", "zh": "请回答是或否。"}
YES: dict[api.Language, str] = {"en": "yes", "zh": "是"}


def refuse_marks(question: api.Question) -> None:
    """GatewayError 400 for a text that holds a mark of turns, images or boxes: it would forge one in the prompt."""
    for name in ("question", "finding"):
        text = getattr(question, name) or ""
        if _MARK.search(text) or IMAGE_MARK in text or BOX_MARK.search(text) or any(token in text for token in CONTROL):
            message = (
                f"{name}: holds a control token such as <|im_end|> or {IMAGE_MARK}, which only the gateway may write"
            )
            raise bad_request("control-token", f"{message}; leave it out", name)


def main(question: api.Question, bare: bool) -> str:
    """What is asked for the answer itself. `bare` asks a finding as the training data do, without "yes or no"."""
    if question.task == "ask":
        return (question.question or "").strip()
    if question.task == "report":
        return _REPORT[question.language]
    return (
        presence(question, bare) if question.task == "finding" else _WHERE[question.language].format(_named(question))
    )


def presence(question: api.Question, bare: bool) -> str:
    """Whether the finding is there."""
    asked = _PRESENT[question.language].format((question.finding or "").strip())
    return asked if bare else asked + _CLOSED[question.language]


def grounding(question: api.Question) -> str:
    """Where it is, as a box in text."""
    if question.finding is None:
        return _ABOUT[question.language].format((question.question or "").strip())
    return _BOX[question.language].format(_named(question))


def verification(question: api.Question, answer: str) -> str:
    """Whether an answer fits the image: asked back of a model that has no match head, in the words that a stage with
    `verifications` teaches."""
    words = _MARK.sub("", answer).strip()  # a box in the answer is written with control tokens
    return claims.verification(main(question, bare=True), words, question.language)


def _named(question: api.Question) -> str:
    """The finding without its article: "a lesion" is asked for as "the lesion"."""
    return _ARTICLE.sub("", (question.finding or "").strip())


def image_parts(pictures: Sequence[Picture]) -> Content:
    """The pictures as the first parts of a user's message of OpenAI's API."""
    urls = (f"data:{one.media_type};base64,{base64.b64encode(one.data).decode()}" for one in pictures)
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]
