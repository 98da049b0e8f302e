"""Question and answer types, and languages, by rules: only for sources that have no field for them.

The words are matched whole, in the order of the table: "How many lesions are there?" counts, although it also asks
for presence. English and Chinese.
"""

from __future__ import annotations

import re

# question type, English words, Chinese words (which no space sets apart, so they match anywhere)
_WORDS: tuple[tuple[str, str, str], ...] = (
    ("quantity", r"how many|number of|count|quantity", "多少|几个|几|数量"),
    ("color", r"colou?rs?", "颜色"),
    ("plane", r"planes?|axial|sagittal|coronal|cross[- ]section(al)?", "平面|切面|横断面|矢状|冠状"),
    (
        "modality",
        r"modality|imaging (technique|method|type)|(type|kind|form|method) of (imaging|image|scan|study|radiograph)|"
        r"ct|mri?|x[- ]?rays?|radiographs?|ultrasound|t[12]|flair|weight(ed|ing)|contrast",
        "模态|成像方式|加权|拍摄",
    ),
    (
        "size",
        r"sizes?|large|larger|largest|big|bigger|biggest|small|smaller|smallest|enlarged|diameter",
        "大小|最大|最小|大|小",
    ),
    ("attribute", r"shape|density|texture|intensity|appearance|margins?", "形状|密度|形态|特征"),
    (
        "position",
        r"where|locations?|located|locali[sz]ed|positions?|which (side|lobe|quadrant)",
        "哪里|位置|哪边|哪一侧|在哪|何处",
    ),
    (
        "abnormality",
        r"abnormal|abnormality|abnormalities|diseases?|lesions?|patholog(y|ies|ical)|diagnos(is|es|ed)|wrong|normal|"
        r"healthy|findings?",
        "异常|疾病|病变|病灶|健康|正常|诊断",
    ),
    ("organ", r"organs?|body parts?|part of the body", "器官|部位|身体"),
    (
        "presence",
        r"there (is|are)|is there|are there|present|presence|evidence|seen|visible|shown?|contains?|any",
        "有没有|是否|存在|包含|有",
    ),
)
_RULES = tuple((name, re.compile(rf"\b(?:{words})\b|{han}", re.IGNORECASE)) for name, words, han in _WORDS)
_ASKS_PRESENCE = re.compile(r"\s*(is|are|was|were|does|do|did|has|have|can)\b", re.IGNORECASE)
_HAN = re.compile(r"[㐀-䶿一-鿿]")
_YES_NO = frozenset(
    (
        *("yes", "no", "是", "否", "有", "无", "能", "对", "不", "会", "是的", "不是", "没有", "不能", "不对", "对的"),
        *("存在", "不存在", "不会", "可以", "不可以", "包含", "不包含"),
    )
)


def question_type(question: str) -> str:
    """quantity, color, plane, modality, size, attribute, position, abnormality, organ, presence or other."""
    for name, rule in _RULES:
        if rule.search(question):
            return name
    return "presence" if _ASKS_PRESENCE.match(question) else "other"


def answer_type(answer: str) -> str:
    """closed for a bare yes or no in English or Chinese, else open."""
    return "closed" if answer.strip(" \t\n.!,。！，").casefold() in _YES_NO else "open"


def language(text: str) -> str:
    """zh when a Chinese character stands in the text, else en."""
    return "zh" if _HAN.search(text) else "en"
