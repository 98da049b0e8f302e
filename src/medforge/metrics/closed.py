"""Closed questions: what a free answer to a yes/no or either/or question says, and whether that is right.

Word boundaries and negation decide, not substrings: "The lungs appear normal." is no "no". An answer from which
nothing can be read is `unparsed`, and counts as wrong.
"""

from __future__ import annotations

import itertools
import re
from typing import Literal

from medforge.metrics.text import normalise, tokens

Parsed = Literal["yes", "no", "option", "unparsed"]

_ECHO = re.compile(r"\byes\s*(?:or|/)\s*no\b|是否|是不是|有没有|有无")
_SIGNAL = re.compile(
    r"""
    (?P<hedge> \b(?:can(?:not|'t|\ not)|could(?:\ not|n't)|unable\ to|(?:im|not\ )possible\ to)\ (?:be\ )?
               (?:determined?|excluded?|ruled?|assess(?:ed)?|answer(?:ed)?|confirm(?:ed)?|tell|say|said)\b
             | \b(?:uncertain|unclear|indeterminate|unknown|not\ (?:sure|certain|clear))\b
             | 无法 | 不确定 | 不清楚 | 不能确定 | 难以 )
  | (?P<no>    \bno\b(?!\.\ ?\d) | \b(?:not|cannot|none|never|neither|without|absent|absence|negative|false|incorrect)\b
             | \w+n't\b | \b(?:lacks?|free\ of)\b
             | 不 | 没有 | 没 | 未 | 无 | 否 )
  | (?P<yes>   \b(?:yes|present|positive|true|correct)\b
             | \bthere\ (?:is|are|was|were)\b(?!\ (?:no|not|never|neither|(?:an\ )?absence)\b)
             | ^是 | ^对 | ^能 | 正确 | 存在 | 包含 | 包括 | 可以 | 可见 | 有 )
    """,
    re.VERBOSE,
)
_ZH_YES = "是|是的|有|存在|对|正确|能|可以|包含|包括"  # the last three answer many of SLAKE's questions
_ZH_NO = "否|无|没有|不|不是|不存在|不对|不正确|不能|不可以|不包含|不包括"
_STRICT = re.compile(rf"(?P<yes>yes\b|(?:{_ZH_YES})$)|(?P<no>no\b(?!\. ?\d)|(?:{_ZH_NO})$)")
_SEVERAL = re.compile(r"[,;/、]|\b(?:or|and|versus|vs|than|both|either|neither)\b|或|和|还是|与")
_ITEMS = re.compile(r"[,;、]|\band\b|和")
_OR = re.compile(r"\bor\b|/|还是|或")


def _plain(text: str) -> str:
    return normalise(text.replace("’", "'"))


def _strict_yes_no(text: str) -> Parsed | None:
    """yes or no when the text's first word says it (the whole text in Chinese), else None."""
    match = _STRICT.match(_plain(text))
    return None if match is None else ("yes" if match["yes"] else "no")


def parse_yes_no(text: str) -> Parsed:
    """`yes`, `no` or `unparsed` for an answer to a yes/no question, by the first word or phrase that tells.

    A first word yes or no wins thereby; "no evidence of X", "there is no X", "X is not seen", "without X" are no;
    "there is X" and "X is present" are yes; "cannot be excluded" and the like, and a statement without any such word,
    are unparsed. What is negated is not weighed: to "Is it abnormal?", "It is not normal." reads as no.
    """
    match = _SIGNAL.search(_ECHO.sub(" ", _plain(text)).strip())
    if match is None or match["hedge"]:
        return "unparsed"
    return "no" if match["no"] else "yes"


def parse_closed(answer: str, reference: str, question: str = "") -> Parsed:
    """What `answer` says, read as the kind of answer that `reference` is: yes or no, or an option.

    An option is unparsed when the answer is blank or hedges, or when it holds the right option but negates it or
    names others too, so that no choice can be read from it.
    """
    if _strict_yes_no(reference):
        return parse_yes_no(answer)
    if _chooses(answer, reference, question):
        return "option"
    if clear := _strict_yes_no(answer):
        return clear
    signal = _SIGNAL.search(_plain(answer))
    hedges = signal is not None and signal["hedge"]
    return "unparsed" if hedges or not tokens(answer) or _contains(tokens(answer), tokens(reference)) else "option"


def closed_accuracy(answer: str, reference: str, question: str = "") -> float:
    """1.0 for a right answer to a closed question, else 0.0; an unparsed answer is wrong.

    A reference that begins with yes or no is compared with `parse_yes_no` of the answer. Any other ("CT", "Left
    Lung") is an option: the answer must be the same list of items in any order, or a single clause that holds the
    reference's words in a row, negates nothing, and names no rival: no word beside an "or" of the question.
    """
    expected = _strict_yes_no(reference)
    if expected:
        return float(parse_yes_no(answer) == expected)
    return float(_chooses(answer, reference, question))


def unparsed(answer: str, reference: str, question: str = "") -> float:
    """1.0 when `parse_closed` can read no choice from the answer, else 0.0."""
    return float(parse_closed(answer, reference, question) == "unparsed")


def _chooses(answer: str, reference: str, question: str) -> bool:
    said, expected = _plain(answer), _plain(reference)
    if _items(said) == _items(expected):
        return True
    if _SEVERAL.search(expected) or _SEVERAL.search(said) or not _contains(tokens(said), tokens(expected)):
        return False
    return _negates(said) <= _negates(expected) and not _rivals(question, expected) & set(tokens(said))


def _items(text: str) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(tokens(item)) for item in _ITEMS.split(text) if item.strip())


def _negates(text: str) -> bool:
    return any(match["no"] or match["hedge"] for match in _SIGNAL.finditer(text))


def _contains(words: list[str], phrase: list[str]) -> bool:
    size = len(phrase)
    return size > 0 and any(words[start : start + size] == phrase for start in range(len(words) - size + 1))


def _rivals(question: str, reference: str) -> set[str]:
    """The words of the options that the question offers besides the reference: those that stand next to an "or", as
    many on either side as the reference has words."""
    expected = tokens(reference)
    sides = [tokens(part) for part in _OR.split(_plain(question))]
    offered: set[str] = set()
    for before, after in itertools.pairwise(sides):
        offered |= set(before[-len(expected) :]) | set(after[: len(expected)])
    return offered - set(expected)
