"""Claims: a question with a proposed answer, which the match head judges against the image.

A sample's own answer makes a claim that fits. A claim that does not fit takes a wrong answer to the same question: the
text is swapped, never the image. An answer that another image was given may be just as true of this one (the in-batch
negatives of ALBEF, Li et al. 2021, arXiv 2107.07651, section 3.2, have to live with that), and a true claim labelled
as wrong teaches the head to miss findings. So only an answer that `contradicts` the sample's own is taken.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from medforge.records import BOX_MARK, Sample, Turn

VERIFICATION = "verification"  # the question type of `verifications`

Polarity = Literal["yes", "no", ""]

# Kinds of question whose answer is a value of its own and not the finding under another name: two images of one
# diagnosis may well differ in it. Any other kind may ask for the finding, also one that is unknown here.
_NOT_THE_FINDING = frozenset(
    ("attribute", "color", "modality", "organ", "plane", "position", "quantity", "shape", "size")
)
_PAIRS = (
    *(("yes", "no"), ("是", "否"), ("是的", "不是"), ("有", "没有"), ("存在", "不存在"), ("包含", "不包含")),
    *(("包括", "不包括"), ("可以", "不可以"), ("能", "不能"), ("会", "不会"), ("对", "不对"), ("正确", "不正确")),
    *(("正常", "不正常"),),
)
_YES, _NO = frozenset(yes for yes, _ in _PAIRS), frozenset(no for _, no in _PAIRS) | {"无"}
_OPPOSITES = dict(_PAIRS) | {no: yes for yes, no in _PAIRS} | {"无": "有"}
_OTHER_POLARITY: dict[Polarity, Polarity] = {"yes": "no", "no": "yes", "": ""}
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_IS_HAN = re.compile(rf"[{_HAN}]")
_WORD = re.compile(rf"\d+\.\d+|[{_HAN}]|[^\W_{_HAN}]+")
_ITEMS = re.compile(r"[,;:/、。\n]|\.(?!\d)|\b(?:and|or|with)\b|和|与|及|或")
_EMPTY_WORDS = frozenset(
    (*("a", "an", "the", "of", "in", "on", "at", "is", "it"), *("side", "lobe", "plane", "view", "scan"), *"的侧部叶")
)
# what says several things at once, or nothing for certain
_VAGUE = re.compile(
    r"\b(?:both|bilateral(?:ly)?|all|entire|diffuse(?:ly)?|maybe|perhaps|possibl[ey]|probabl[ey]|likely|sure|unclear"
    r"|uncertain|unknown|cannot|other)\b|双|两侧|都|全部|可能|不确定|不清楚|无法"
)
# other ways of writing the same
_PHRASES = (
    (re.compile(r"\bx[\s-]?rays?\b|x\s?(?:光|射线|线)|\bradiogra\w+|\bplain film|\bcxr\b"), " xray "),
    (re.compile(r"(?:核)?磁共振(?:成像)?|\bmagnetic resonance\b|\bmr\b"), " mri "),
    (re.compile(r"\bcomputed tomography\b|\bcat scan\b|计算机断层(?:扫描)?"), " ct "),
    (re.compile(r"\bsonogra\w+"), " ultrasound "),
)
_NUMBERS = {
    **{word: str(n) for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight"))},
    **{word: str(n) for n, word in enumerate("零一二三四五六七八")},
    "none": "0",
    "single": "1",
    "两": "2",
}
_MRI_SEQUENCES = frozenset(("t1", "t2", "flair", "dwi", "adc"))  # "T2" may be said of what is an "MRI"
# a side's axis and its name on it; the middle can be meant on either of the first two
_SIDES = {
    **dict.fromkeys(("left", "l", "左"), ("across", "left")),
    **dict.fromkeys(("right", "r", "右"), ("across", "right")),
    **dict.fromkeys(("upper", "top", "superior", "上", "顶"), ("up", "upper")),
    **dict.fromkeys(("lower", "bottom", "inferior", "下", "底"), ("up", "lower")),
    **dict.fromkeys(("anterior", "front", "前"), ("through", "front")),
    **dict.fromkeys(("posterior", "back", "后"), ("through", "back")),
}
_MIDDLE = frozenset(("middle", "center", "centre", "central", "midline", "中"))
_SIDE_WORDS = _MIDDLE.union(_SIDES)
_LOOKS = 16


def claimable(sample: Sample) -> bool:
    """Whether the sample's question and answer make a claim: an image, one user turn and after it one assistant turn
    (system turns do not count), and an answer in words, without the mark of a box, which the region head gives."""
    roles = [turn.role for turn in sample.turns if turn.role != "system"]
    if sample.question_type == VERIFICATION:
        return False  # it is about a claim already
    return roles == ["user", "assistant"] and bool(sample.images) and not BOX_MARK.search(sample.answer)


def claim(sample: Sample, answer: str) -> Sample:
    """The sample with the claim that `answer` answers its question as its last turn, for `Encoder.encode_prompt`.

    It has no assistant turn, so that nothing the head sees tells which answer is the right one.
    """
    turns = [turn for turn in sample.turns if turn.role != "assistant"]
    turns[-1] = Turn(turns[-1].role, _proposed(turns[-1].text, answer, sample.language))
    return replace(sample, turns=tuple(turns))


def _proposed(question: str, answer: str, language: str) -> str:
    label = "拟议答案：" if language == "zh" else "Proposed answer: "
    return f"{question.rstrip()}\n{label}{answer.strip()}"


def verification(question: str, answer: str, language: str) -> str:
    """The question whether `answer` fits the image, which a model without a match head is asked, and is taught by
    `verifications`."""
    asked = (
        "拟议答案与图像相符吗？请回答是或否。"
        if language == "zh"
        else "Does the proposed answer fit the image? Answer yes or no."
    )
    return f"{_proposed(question, answer, language)}\n{asked}"


def verifications(samples: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """Questions whether an answer fits, to be answered by yes or no: for some of `samples` with their own answer, and
    with one that is certainly wrong. They are about `share` times as many, as far as wrong answers are known."""
    wrong = wrong_answers(samples, seed)
    able = [(sample, answer) for sample, answer in zip(samples, wrong, strict=True) if answer is not None]
    rng = random.Random(f"{seed} verifications")  # noqa: S311 - no secret
    chosen = rng.sample(able, min(len(able), max(1, round(share * len(samples) / 2))))
    return [
        _verification(sample, proposed, fits) for sample, answer in chosen
        for proposed, fits in ((sample.answer, True), (answer, False))
    ]  # fmt: skip


def _verification(sample: Sample, answer: str, fits: bool) -> Sample:
    *before, question = [turn for turn in sample.turns if turn.role != "assistant"]
    said = ("是" if fits else "否") if sample.language == "zh" else ("yes" if fits else "no")
    asked = Turn(question.role, verification(question.text, answer, sample.language))
    return replace(
        sample,
        id=f"{sample.id}-{'fits' if fits else 'wrong'}",
        turns=(*before, asked, Turn("assistant", said)),
        answer_type="closed",
        question_type=VERIFICATION,
    )


def opposite(answer: str) -> str | None:
    """The other word where `answer` is exactly a yes or a no, such as "No." for "Yes." and 没有 for 有; else None.

    Case and closing punctuation are kept: they must not tell right from wrong.
    """
    core = answer.strip().rstrip(" .!。！")
    other = _OPPOSITES.get(_plain(core))
    if other is None:
        return None
    cased = other.upper() if core.isupper() else other.capitalize() if core[0].isupper() else other
    return answer.strip().replace(core, cased, 1)


def contradicts(sample: Sample, other: Sample) -> bool:
    """Whether the answer of `other` is certainly wrong as an answer to the question of `sample`; both are `claimable`.

    When in doubt, no. It is certain when all of this holds:

    - Both have the same question type, answer type and language, and are of different studies: what is said of one
      study may be one finding in two ways of asking.
    - If either answer begins with yes or no, the other begins with the opposite. That alone is enough.
    - Otherwise a closed question is the same question in the same words, as its options are its own; an open question
      is not about attributes, as many are true at once ("cystic", "round").
    - They do not have the same `target_diagnosis`: two answers may be two names of it. This does not count for the
      kinds of question that ask for something else, such as the place: two lesions stand in two places.
    - Neither answer is vague ("both", "maybe"), and no item of one holds the words of an item of the other: "left lung,
      liver" is no wrong answer where "the lung" is right.
    - Unless two different diagnoses are known: answers that share a word or name a side differ in a side on the same
      axis: "upper right lung" and "lower right lung" do, "right" and "top", "large mass" and "round mass" do not.

    It cannot see that different words mean the same ("cardiomegaly", "enlarged heart") where no diagnosis is given.
    """
    if _kind(sample) != _kind(other) or sample.study_id == other.study_id:
        return False
    polarity, others = _polarity(sample.answer), _polarity(other.answer)
    if polarity or others:
        return bool(polarity) and others == _OTHER_POLARITY[polarity]
    if sample.answer_type == "closed":
        if _plain(sample.question) != _plain(other.question):
            return False
    elif sample.question_type == "attribute":
        return False
    diagnosis, another = _diagnosis(sample), _diagnosis(other)
    known = diagnosis is not None and another is not None
    return not (known and diagnosis == another) and _apart(sample.answer, other.answer, strict=not known)


def wrong_answers(samples: Sequence[Sample], seed: int) -> list[str | None]:
    """For each sample an answer that is certainly wrong; None for one that is not `claimable` or where none was found.

    A bare yes or no gets its `opposite`. Any other is drawn from the samples that it `contradicts`, those that were
    asked the same question first, and never one that was given to a question of its type in the sample's own study.
    The draw follows the frequency of the answers, so that a rare one is not known as wrong by its rarity. It depends
    on `seed`, the samples' ids and their order. Where few answers fit, all are looked at if they are at most
    16 different ones, else 16 draws: the time grows with the number of samples, not with its square.
    """
    pools: defaultdict[tuple[str, ...], _Pool] = defaultdict(_Pool)
    said: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)  # in a study, to a kind of question
    kept = [sample if claimable(sample) else None for sample in samples]
    for sample in kept:
        if sample is not None:
            said[(sample.study_id, *_kind(sample))].add(_plain(sample.answer))
            for key in _keys(sample, _polarity(sample.answer)):
                pools[key].add(sample)
    found: list[str | None] = []
    for sample in kept:
        answer = opposite(sample.answer) if sample is not None else None
        if sample is not None and answer is None:
            rng = random.Random(f"{seed} {sample.id}")  # noqa: S311 - no secret; a text seeds it the same everywhere
            own = said[(sample.study_id, *_kind(sample))]
            keys = _keys(sample, _OTHER_POLARITY[_polarity(sample.answer)])
            answers = (pools[key].draw(sample, own, rng) for key in keys if key in pools)
            answer = next((text for text in answers if text is not None), None)
        found.append(answer)
    return found


@dataclass
class _Pool:
    """Samples whose answers can be wrong answers to each other's questions; also by diagnosis and answer."""

    members: list[Sample] = field(default_factory=list)
    distinct: dict[tuple[str | None, str], list[Sample]] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        self.members.append(sample)
        self.distinct.setdefault((_diagnosis(sample), _plain(sample.answer)), []).append(sample)

    def draw(self, sample: Sample, own: set[str], rng: random.Random) -> str | None:
        """The answer of a random member that `sample` contradicts, none of the answers in `own`; None without any."""

        def fits(other: Sample) -> bool:
            polar = _polarity(sample.answer) != ""  # then `own` holds the yes and no of other questions
            return (polar or _plain(other.answer) not in own) and contradicts(sample, other)

        if len(self.distinct) > _LOOKS:
            drawn = (rng.choice(self.members) for _ in range(_LOOKS))
            return next((other.answer for other in drawn if fits(other)), None)
        groups = [group for group in self.distinct.values() if any(map(fits, group[:_LOOKS]))]
        if not groups:
            return None
        group = rng.choices(groups, weights=[len(group) for group in groups])[0]
        return rng.choice(group).answer


def _kind(sample: Sample) -> tuple[str, str, str]:
    return sample.question_type, sample.answer_type, sample.language


def _keys(sample: Sample, polarity: Polarity) -> list[tuple[str, ...]]:
    """The pools of answers with `polarity` to the same question, and to any question of its kind."""
    kind = (*_kind(sample), polarity)
    same_question = (*kind, _plain(sample.question))
    return [same_question] if sample.answer_type == "closed" and not polarity else [same_question, kind]


def _diagnosis(sample: Sample) -> str | None:
    """The diagnosis, where the answer may be another name of it."""
    if sample.question_type in _NOT_THE_FINDING or not sample.target_diagnosis:
        return None
    return _plain(sample.target_diagnosis)


@lru_cache(maxsize=1 << 16)
def _plain(text: str) -> str:
    """The text in lower case, without repeated white space and without punctuation at its ends."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(" .,;:!?\"'。、“”‘’") or plain


@lru_cache(maxsize=1 << 16)
def _polarity(answer: str) -> Polarity:
    """yes or no where the first word (in Chinese: the first clause) says so."""
    plain = _plain(answer)
    clause = re.split(r"[,;:!?.。、\s]", plain, maxsplit=1)[0]
    return "yes" if clause in _YES else "no" if clause in _NO else ""


@lru_cache(maxsize=1 << 16)
def _items(answer: str) -> tuple[frozenset[str], ...]:
    """The words of each item of a list, or of each clause of a sentence; none for a vague answer."""
    plain = _plain(answer)
    if _VAGUE.search(plain):
        return ()
    for phrase, name in _PHRASES:
        plain = phrase.sub(name, plain)
    listed = (_WORD.findall(item) for item in _ITEMS.split(plain.replace("-", "")))
    found = (frozenset(_NUMBERS.get(word, word) for word in words) - _EMPTY_WORDS for words in listed)
    return tuple(words for words in found if words)


def _apart(one: str, other: str, strict: bool) -> bool:
    """Whether the two answers cannot both be right; False when in doubt. `contradicts` tells the rule."""
    items, others = _items(one), _items(other)
    if not items or not others or any(_holds(a, b) or _holds(b, a) for a in items for b in others):
        return False
    if not strict:
        return True
    words, their_words = frozenset().union(*items), frozenset().union(*others)
    sides, their_sides = _sides(words), _sides(their_words)
    if any(sides[axis].isdisjoint(their_sides[axis]) for axis in sides.keys() & their_sides.keys()):
        return True
    if (sides and their_sides) or _SIDE_WORDS.issuperset(words) or _SIDE_WORDS.issuperset(their_words):
        return False  # "right" and "top", "right" and "liver" may be the same place
    return not any(_same(a, b) for a in words for b in their_words if not _IS_HAN.match(a))


def _holds(words: frozenset[str], others: frozenset[str]) -> bool:
    """Whether each of `others` is among `words`, or implied by one of them."""
    known = words | {"mri"} if words & _MRI_SEQUENCES else words
    return all(any(_same(a, b) for a in known) for b in others)


def _same(one: str, other: str) -> bool:
    """Whether two words are equal, or one is the beginning of the other ("lung", "lungs")."""
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    return len(short) > 1 and one.isalpha() and other.isalpha() and long.startswith(short)


def _sides(words: frozenset[str]) -> dict[str, set[str]]:
    """The sides that are named, by axis. The middle is meant on the axes that no other word names."""
    found: dict[str, set[str]] = {}
    for axis, side in (_SIDES[word] for word in words if word in _SIDES):
        found.setdefault(axis, set()).add(side)
    if words & _MIDDLE:
        for axis in ("across", "up"):
            found.setdefault(axis, {"middle"})
    return found
