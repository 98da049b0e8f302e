"""Metrics of one answer's text against its reference: exact match, soft match, token precision, recall and F1."""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections import Counter

from medforge.records import BOX_MARK

# Marks that end or quote an answer. Signs that carry meaning (+ - % < > =) and brackets are not among them.
_EDGES = " .,;:!?\"'`。、“”‘’「」『』"
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_ARTICLES = frozenset({"a", "an", "the"})
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")

_BOX_TEXTS = re.compile(
    rf"""{BOX_MARK.pattern}
    | <\|object_ref_start\|>.*?<\|object_ref_end\|>
    | <\|box_start\|>.*?<\|box_end\|>
    | \[?\s*\{{[^{{}}]*"bbox_2d"[^{{}}]*\}}\s*\]?
    | \(\s*-?[\d.]+\s*,\s*-?[\d.]+\s*\)\s*,\s*\(\s*-?[\d.]+\s*,\s*-?[\d.]+\s*\)
    | \[\s*-?[\d.]+\s*(?:,\s*-?[\d.]+\s*){{3}}\]
    | ```(?:json)?
    """,
    re.VERBOSE | re.DOTALL,
)


def normalise(text: str) -> str:
    """`text` for comparison: NFKC (full-width forms become plain), lower case, white space collapsed, and the
    punctuation ``. , ; : ! ? " ' ` 。 、`` and curly or corner quotes removed at both ends (never inside).

    A text of nothing but such punctuation keeps it.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return plain.strip(_EDGES) or plain


def prose(text: str) -> str:
    """`text` without its boxes, in the form of any family; "" when it is only boxes."""
    rest = _BOX_TEXTS.sub(" ", text)
    return " ".join(rest.split()) if any(character.isalnum() for character in rest) else ""


def exact_match(answer: str, reference: str) -> float:
    """1.0 when the normalised texts are equal, else 0.0 (the common VQA exact match; `normalise` tells the rules)."""
    return float(normalise(answer) == normalise(reference))


def soft_match(answer: str, reference: str) -> float:
    """Ratcliff/Obershelp similarity 2M/T of the normalised texts, 0–1, by difflib with autojunk off.

    Python's difflib.SequenceMatcher(None, reference, answer).ratio(); its default autojunk drops every frequent
    character of texts from 200 characters on, which makes 'lung' against a report 0.
    """
    return difflib.SequenceMatcher(None, normalise(reference), normalise(answer), autojunk=False).ratio()


def tokens(text: str) -> list[str]:
    """SQuAD's tokens: lower case, punctuation deleted ("x-ray" is "xray"), the articles a, an, the dropped, split at
    white space. Beyond SQuAD: NFKC first, each Chinese or Japanese character is a token, the point of a decimal
    number stays (1.5 cm is not 15 cm), and a text of articles alone ("A" as an option) keeps them.
    """
    text = _DECIMAL_POINT.sub("\0", unicodedata.normalize("NFKC", text).lower())
    kept = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    found: list[str] = _TOKEN.findall(kept.replace("\0", "."))
    return [token for token in found if token not in _ARTICLES] or found


def _overlap(answer: str, reference: str) -> tuple[float, float]:
    """Precision and recall over bags of tokens. Where a side has no token at all, both are the exact match."""
    said, expected = Counter(tokens(answer)), Counter(tokens(reference))
    if not said or not expected:
        return (exact_match(answer, reference),) * 2
    common = (said & expected).total()
    return common / said.total(), common / expected.total()


def token_precision(answer: str, reference: str) -> float:
    """Share of the answer's tokens that the reference has, each counted as often as it stands (SQuAD, Rajpurkar et
    al. 2016, section 6.1; `tokens` tells the rules). An empty answer has 0."""
    return _overlap(answer, reference)[0]


def token_recall(answer: str, reference: str) -> float:
    """Share of the reference's tokens that the answer has, with multiplicity. Long answers raise it: read it together
    with answer_length."""
    return _overlap(answer, reference)[1]


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of `token_precision` and `token_recall`: SQuAD's F1 of one answer, 0–1."""
    precision, recall = _overlap(answer, reference)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
