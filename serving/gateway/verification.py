"""From what a model said to a decision: how sure it was, whether it refused, and whether its answer may be shown.

What could not be measured never passes: an answer whose match or confidence is unknown is withheld where a threshold
above 0 asks for one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from medforge.metrics.closed import parse_yes_no
from serving.gateway import api
from serving.gateway.answers import Token
from serving.gateway.settings import Settings

_YES = frozenset(("yes", "true", "是", "是的", "有", "存在", "对", "正确", "符合", "相符", "吻合"))
_NO = frozenset(
    ("no", "not", "false", "否", "不", "不是", "没", "没有", "无", "未", "不存在", "不对", "不符", "不符合")
)
_LEAST_MASS = 0.1  # of yes and no together: below it the token is another word, and their ratio tells nothing

# The first is what refusal-aware stages teach (RefusalConfig in medforge.stages); the others are usual ones.
_REFUSAL = re.compile(
    r"""
    \b(?:can(?:not|'t|\ not)|could(?:\ not|n't))\ be\ (?:told|determined|answered|assessed|established)\b
  | \b(?:i|we)\s*(?:'m|\ am|\ are)?\s*(?:sorry|(?:un|not\ )able\ to|can(?:not|'t|\ not)\s+(?:help|assist|answer|tell|say
      |determine|diagnose|interpret|analy[sz]e|provide|identify|see|view))\b
  | \b(?:unable|not\ possible|impossible)\ to\ (?:tell|determine|answer|assess|say|diagnose|interpret|provide)\b
  | \bas\ an?\ (?:ai|language\ model)\b
  | \bno\ image\ (?:was|is|has\ been)\ (?:provided|attached|given|visible)\b
  | \b(?:insufficient|not\ enough)\ information\b
  | (?:无法|不能|难以)(?:从.{0,8}?中)?(?:判断|确定|回答|得知|诊断|识别|评估|提供|分辨)
  | 看不出来 | 抱歉 | 作为(?:一个)?(?:AI|人工智能|语言模型) | 没有(?:提供|看到)(?:任何)?图[像片] | 信息不足
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_REFUSAL_WORDS, _REFUSAL_LETTERS = 40, 80


def confidence(tokens: Sequence[Token]) -> float | None:
    """The geometric mean of the tokens' probabilities; None without any."""
    if not tokens:
        return None
    return min(1.0, math.exp(sum(token.logprob for token in tokens) / len(tokens)))


def yes_probability(tokens: Sequence[Token]) -> float | None:
    """P(yes) / (P(yes) + P(no)) at the first token that is a word, over all ways of writing them.

    None where the word is neither, or where its alternatives were not given: a yes alone tells nothing of the no.
    """
    first = next((token for token in tokens if _plain(token.text)), None)
    if first is None or not first.top:
        return None
    likely = {**first.top, first.text: first.logprob}
    yes, no = (
        sum(math.exp(logprob) for text, logprob in likely.items() if _plain(text) in words) for words in (_YES, _NO)
    )
    return yes / (yes + no) if yes + no >= _LEAST_MASS else None


def _plain(text: str) -> str:
    return text.strip(" \t\r\n.,:;!?\"'*`()。，！：“”").casefold()


def is_refusal(text: str) -> bool:
    """Whether the model says that it cannot answer.

    A short text whose first sentence says so: a report may say of one thing that it cannot be assessed.
    """
    sentences = [part for part in _SENTENCE.split(text.strip().replace("’", "'")) if part.strip()]
    short = len(text.split()) <= _REFUSAL_WORDS and (text.isascii() or len(text) <= _REFUSAL_LETTERS)
    return bool(sentences) and short and _REFUSAL.search(sentences[0]) is not None


def read_finding(name: str, text: str, tokens: Sequence[Token]) -> api.Finding | None:
    """The finding as the answer affirms or denies it; None where that cannot be read from it."""
    said: Literal["yes", "no", "option", "unparsed"] = parse_yes_no(text)
    if said not in ("yes", "no"):
        return None
    return api.Finding(name=name, present=said == "yes", probability=yes_probability(tokens))


def is_undecided(finding: api.Finding, margin: float) -> bool:
    """Whether yes and no are too near each other, or the words say the other thing than the probabilities."""
    if finding.probability is None:
        return False
    return abs(finding.probability - 0.5) < margin or (finding.probability > 0.5) != finding.present


def falls_short(score: api.Score | None, threshold: float) -> bool:
    """Whether a score does not reach what it has to; one that is unknown reaches a threshold of 0 only."""
    return threshold > 0 if score is None else score.value < threshold


def decide(
    text: str,
    finish_reason: str,
    task: api.Task,
    finding: api.Finding | None,
    match: api.Score | None,
    sureness: api.Score | None,
    settings: Settings,
) -> api.Reason | None:
    """Why the answer is withheld, or None if it may be shown.

    An answer that was cut off at its longest counts as unreadable: what would have followed might have turned it round.
    A finding is read from its first words, so that this does not matter there.
    """
    if finish_reason == "content_filter" or is_refusal(text):
        return "model-refused"
    if not text.strip() or (finding is None if task == "finding" else finish_reason == "length"):
        return "unreadable"
    if falls_short(match, settings.match_threshold):
        return "low-match"
    if falls_short(sureness, settings.confidence_threshold):
        return "low-confidence"
    if finding is not None and is_undecided(finding, settings.finding_margin):
        return "undecided"
    return None
