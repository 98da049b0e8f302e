"""What training would do to one sample, tried out: contract, images, processor, template, length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from medforge.records import Sample, problems

if TYPE_CHECKING:
    from PIL.Image import Image


class EncodedSample(Protocol):
    """What is looked at in a `medforge.models.encode.Encoded`."""

    @property
    def length(self) -> int: ...

    @property
    def image_tokens(self) -> int: ...

    @property
    def answer_tokens(self) -> int: ...


LoadImages = Callable[[Sample], "Sequence[Image]"]
Encode = Callable[[Sample, "Sequence[Image]"], EncodedSample]


@dataclass(frozen=True)
class Checked:
    """The problems of a sample as (reason, detail), and its tokens (None when it could not be encoded)."""

    problems: tuple[tuple[str, str], ...]
    length: int | None = None
    image_tokens: int | None = None
    answer_tokens: int | None = None


def check_sample(sample: Sample, load_images: LoadImages, encode: Encode, max_length: int) -> Checked:
    """Whether training can use the sample.

    Beyond the reasons of `records.problems`: unreadable-image, image-size (the file is not as large as noted),
    not-encodable (what the encoder says), image-tokens, no-answer-tokens, too-long. A sample that breaks the contract
    is not encoded. `load_images` and `encode` raise ValueError for what is broken in the sample.
    """
    if broken := problems(sample):
        return Checked(tuple(broken))
    try:
        images = load_images(sample)
    except ValueError as error:
        return Checked((("unreadable-image", str(error)),))
    for number, (ref, image) in enumerate(zip(sample.images, images, strict=True)):
        if (ref.width, ref.height) != image.size:
            detail = f"image {number} is {image.width}x{image.height}, noted as {ref.width}x{ref.height}"
            return Checked((("image-size", detail),))
    try:
        encoded = encode(sample, images)
    except ValueError as error:
        return Checked((("not-encodable", str(error)),))
    found: list[tuple[str, str]] = []
    if (encoded.image_tokens > 0) != bool(sample.images):
        found.append(("image-tokens", f"{encoded.image_tokens} image tokens for {len(sample.images)} images"))
    if encoded.answer_tokens < 1:
        found.append(("no-answer-tokens", "not one token of the answer would carry loss"))
    if encoded.length > max_length:
        detail = f"{encoded.length} tokens ({encoded.image_tokens} of images), limit {max_length} (model.max_length)"
        found.append(("too-long", detail))
    return Checked(tuple(found), encoded.length, encoded.image_tokens, encoded.answer_tokens)


class Repeats:
    """Finds samples that were there before in their split: same images, same conversation.

    Text is compared without case, spacing and closing punctuation. The same question with another answer is a
    conflict: counted, because the model cannot learn both, but kept, because nobody knows which one is right.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[str, ...], dict[str, str]] = {}
        self.conflicts: list[dict[str, str]] = []

    def add(self, sample: Sample) -> tuple[str, str] | None:
        """("duplicate", detail) when an equal sample was added before, else None."""
        *before, last = sample.turns
        turns = [f"{turn.role}:{normalised(turn.text)}" for turn in before]
        question = (sample.split, *[ref.sha256 for ref in sample.images], *turns)
        answer = normalised(last.text)
        answers = self._answers.setdefault(question, {})
        if answer in answers:
            return "duplicate", f"the same images, question and answer as sample {answers[answer]}"
        if answers:
            first, other = next(iter(answers.items()))
            self.conflicts.append(
                {
                    "split": sample.split,
                    "question": sample.question,
                    "first": other,
                    "first_answer": first,
                    "second": sample.id,
                    "second_answer": answer,
                }
            )
        answers[answer] = sample.id
        return None


def normalised(text: str) -> str:
    """The text without case, repeated white space and closing punctuation."""
    return " ".join(text.casefold().split()).rstrip(" .,;:!?。，；：！？")
