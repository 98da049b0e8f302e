"""The stage's samples: views and refusals chosen, encoded when asked for, pixels read only when they are needed."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from medforge.dataset import Dataset, choose
from medforge.files import sha256_bytes
from medforge.models.claims import verifications
from medforge.models.encode import Encoded, Encoder, Seen
from medforge.models.rows import Item
from medforge.records import BOX_MARK, ImageRef, Sample, Turn
from medforge.stages import RefusalConfig, StageConfig, ViewConfig

if TYPE_CHECKING:
    from PIL.Image import Image

_PIXEL_BYTES = 1 << 30
_ENCODED_BYTES = 1 << 28
_GREY = (128, 128, 128)
_WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")  # a Chinese character counts as a word

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The most recently used values, up to a number of bytes. Threads may share it."""

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self.limit, self.size = limit, size
        self.held = 0
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made where it is not held."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        self.put(key, value)
        return value

    def peek(self, key: K) -> V | None:
        """The value of `key` where it is held."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Hold `value`, and drop the longest unused ones that no longer fit."""
        with self._lock:
            if key in self._values:
                return
            self._values[key] = value
            self.held += self.size(value)
            while self.held > self.limit and len(self._values) > 1:
                _, dropped = self._values.popitem(last=False)
                self.held -= self.size(dropped)

    def __len__(self) -> int:
        return len(self._values)


class Samples:
    """Samples of one split as the model takes them. Encoded texts and pixels of recent samples are kept."""

    def __init__(self, dataset: Dataset, samples: Sequence[Sample], encoder: Encoder) -> None:
        self.dataset, self.samples, self.encoder = dataset, list(samples), encoder
        self._refs = {ref.sha256: ref for sample in self.samples for ref in sample.images}
        self._items: Recent[int, Item] = Recent(_ENCODED_BYTES, lambda item: item.encoded.input_ids.nbytes * 2)
        self._pixels: Recent[str, np.ndarray] = Recent(_PIXEL_BYTES, lambda array: array.nbytes)
        self._reading = threading.Lock()  # the data set reads one row group at a time

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, index: int) -> Item:
        """The sample at `index`, encoded without its pixels; `tag` is the index."""
        return self._items.get(index, lambda: self._encode(index))

    def claim(self, index: int, answer: str, tag: object) -> Item:
        """The prompt that proposes `answer` to the sample at `index`."""
        sample = self.samples[index]
        return Item(self.encoder.encode_claim(sample, self._measured(sample), answer), _keys(sample), tag)

    def images(self, index: int) -> tuple[str, ...]:
        """The images of the sample at `index`, by content."""
        return _keys(self.samples[index])

    def pixels(self, image: str) -> np.ndarray:
        """The patches of an image, float32 of [patches, dimension]."""
        return self._pixels.get(image, lambda: self._see(self._refs[image]))

    def prompts(self, indexes: Sequence[int]) -> list[Encoded]:
        """What the samples ask, with pixels, ready for generation."""
        return [self.encoder.encode_prompt(self.samples[i], self._seen(self.samples[i])) for i in indexes]

    def decoded(self, index: int) -> list[Image]:
        """The images of the sample at `index` as pictures."""
        return [self._decode(ref) for ref in self.samples[index].images]

    def _encode(self, index: int) -> Item:
        sample = self.samples[index]
        return Item(self.encoder.encode(sample, self._measured(sample)), _keys(sample), index)

    def _measured(self, sample: Sample) -> Seen:
        return self.encoder.measure(sample.images)

    def _seen(self, sample: Sample) -> Seen:
        measured = self._measured(sample)
        arrays = [self.pixels(ref.sha256) for ref in sample.images]
        return replace(measured, pixel_values=np.concatenate(arrays)) if arrays else measured

    def _see(self, ref: ImageRef) -> np.ndarray:
        return self.encoder.see([self._decode(ref)]).pixel_values

    def _decode(self, ref: ImageRef) -> Image:
        from PIL import Image

        from medforge.dataset import decode_image

        if ref.sha256 == blank(ref).sha256:
            return Image.new("RGB", (ref.width, ref.height), _GREY)
        with self._reading:
            data = self.dataset.image_bytes(ref)
        return decode_image(data)


def _keys(sample: Sample) -> tuple[str, ...]:
    return tuple(ref.sha256 for ref in sample.images)


def blank(ref: ImageRef) -> ImageRef:
    """An even grey image of the same size: it shows nothing, so no question about it has an answer."""
    return ImageRef(sha256_bytes(f"blank {ref.width}x{ref.height}".encode()), ref.width, ref.height)


def select(dataset: Dataset, split: str, stage: StageConfig, seed: int) -> tuple[list[Sample], list[float]]:
    """The samples of a stage, and how often an epoch takes each.

    Raises ValueError when the split is empty or a view holds none of its samples.
    """
    limit = stage.samples if split == "train" else stage.validation_samples
    everything = dataset.samples(split)
    if split == "train" and not everything:
        raise ValueError(f"{dataset.folder}: the train split is empty")
    weights = [0.0 if stage.mix else 1.0] * len(everything)
    for number, view in enumerate(stage.mix):
        held = [index for index, sample in enumerate(everything) if holds(view, sample)]
        if not held and split == "train":
            asked = view.model_dump(exclude_defaults=True, exclude={"weight"})
            raise ValueError(
                f"stage {stage.name!r}: mix.{number}: none of the {len(everything)} training samples in "
                f"{dataset.folder} is {asked}; change the view, or leave it out"
            )
        for index in held:
            weights[index] += view.weight
    wanted = [index for index in range(len(everything)) if weights[index]]
    picked = set(choose(wanted, limit, seed))
    kept = [index for index in wanted if index in picked]
    samples = [everything[index] for index in kept]
    shares = [weights[index] for index in kept]
    if stage.refusals is not None and split == "train":
        added = refusals(samples, stage.refusals, seed, f"stage {stage.name!r}: ")
        samples, shares = samples + added, shares + [1.0] * len(added)
    if stage.verifications is not None and split == "train":
        added = verifications([everything[index] for index in kept], stage.verifications.share, seed)
        if not added:
            raise ValueError(
                f"stage {stage.name!r}: verifications: no wrong answer is known for certain for any of the {len(kept)} "
                "training samples; leave it out"
            )
        samples, shares = samples + added, shares + [1.0] * len(added)
    return samples, shares


def holds(view: ViewConfig, sample: Sample) -> bool:
    """Whether a sample is in a view."""
    return (
        (not view.answer_types or sample.answer_type in view.answer_types)
        and (not view.question_types or sample.question_type in view.question_types)
        and (not view.languages or sample.language in view.languages)
        and (view.boxes is None or view.boxes == bool(sample.boxes))
        and len(_WORD.findall(sample.answer)) >= view.min_answer_words
    )


def refusals(samples: Sequence[Sample], config: RefusalConfig, seed: int, where: str = "") -> list[Sample]:
    """Questions of `samples`, asked of a blank image of the same size and answered by a refusal.

    Raises ValueError, `where` before it, when none of them is a single question about an image.
    """
    able = [sample for sample in samples if _refusable(sample)]
    if not able:
        raise ValueError(f"{where}refusals: no training sample is a single question about an image; leave it out")
    added = []
    for sample in choose(able, max(1, round(config.share * len(samples))), seed):
        answer = config.answer_zh if sample.language == "zh" else config.answer
        turns = tuple(Turn(t.role, answer) if t.role == "assistant" else t for t in sample.turns)
        images = tuple(blank(ref) for ref in sample.images)
        added.append(
            replace(sample, id=f"{sample.id}-refusal", images=images, turns=turns, boxes=(), answer_type="open")
        )
    return added


def _refusable(sample: Sample) -> bool:
    """Whether a sample is one question about images as a whole: a box has no meaning on a blank one."""
    asked = [turn.text for turn in sample.turns if turn.role != "assistant"]
    single = sum(turn.role == "assistant" for turn in sample.turns) == 1
    return bool(sample.images) and single and not any(BOX_MARK.search(text) for text in asked)
