"""A sample as a model's tensors: what training, validation and evaluation all see.

The stock Qwen-VL processors want a video processor, and that wants torchvision. Only images are used here, so the
image processor and the tokenizer are called directly; the result is the stock processor's (the unit tests compare).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medforge.files import read_json
from medforge.models.claims import claim
from medforge.models.families import family_of
from medforge.models.prompts import Size, messages
from medforge.records import ImageRef, Sample

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

IGNORE = -100  # the label that carries no loss
# what turns and images are made of: in a sample's own text they would forge a turn, or an image that is not there
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"),
)


@dataclass(frozen=True)
class Encoded:
    """One encoded sample.

    `input_ids` and `labels` are int64 of [length]; a label is IGNORE but for the answers and their end tokens.
    `pixel_values` is float32 of [patches, channels x 2 x patch x patch], `grid` int64 of [images, 3] (time, height,
    width in patches), `sizes` the resized images' (width, height) in pixels.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixel_values: np.ndarray
    grid: np.ndarray
    image_tokens: int
    sizes: tuple[Size, ...]

    @property
    def length(self) -> int:
        """Tokens, image tokens counted."""
        return len(self.input_ids)

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Seen:
    """Images as the model takes them; many questions about them can share one. Shapes as in `Encoded`."""

    pixel_values: np.ndarray
    grid: np.ndarray
    sizes: tuple[Size, ...]


class Encoder:
    """Encodes samples for the model in a folder. Cheap to pickle: the tokenizer is loaded where it is used."""

    def __init__(self, folder: Path | str, min_pixels: int, max_pixels: int) -> None:
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        self.folder = Path(folder)
        self.family = family_of(self.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(str(self.folder))
        size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(str(self.folder), size=size)
        self.image_id = self._id("<|image_pad|>")
        self.end_id = self._id("<|im_end|>")
        self.pad_id = self._id("<|endoftext|>")
        self._start = [self._id("<|im_start|>"), *self.tokenizer.encode("assistant\n", add_special_tokens=False)]
        self.template = self.tokenizer.chat_template or _template(self.folder)

    def _id(self, token: str) -> int:
        number = self.tokenizer.convert_tokens_to_ids(token)
        if number is None or number == self.tokenizer.unk_token_id:
            raise ValueError(f"{self.folder}: the tokenizer lacks {token}, which every Qwen-VL has")
        return int(number)

    def see(self, images: Sequence[Image]) -> Seen:
        """The images resized, normalised and cut into patches.

        Raises ValueError when one is too elongated for the family (more than 200 to 1).
        """
        processor = self.image_processor
        if not images:
            dimension = 3 * processor.temporal_patch_size * processor.patch_size**2
            return Seen(np.zeros((0, dimension), np.float32), np.zeros((0, 3), np.int64), ())
        # one at a time: the stock processor groups images by size, which would be work for nothing here
        encoded = [processor(images=image.convert("RGB"), return_tensors="np") for image in images]
        pixels = np.concatenate([item["pixel_values"] for item in encoded]).astype(np.float32)
        grid = np.concatenate([item["image_grid_thw"] for item in encoded]).astype(np.int64)
        patch = processor.patch_size
        return Seen(pixels, grid, tuple((int(w) * patch, int(h) * patch) for _, h, w in grid))

    def measure(self, images: Sequence[ImageRef]) -> Seen:
        """What `see` tells of images of these sizes, without their pixels: `pixel_values` has no rows.

        Enough to encode the text; training reads the pixels later, or has the vision tower's features on disk.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        processor = self.image_processor
        patch, size = processor.patch_size, processor.size
        factor = patch * processor.merge_size
        grid = np.zeros((len(images), 3), np.int64)
        for row, ref in enumerate(images):
            height, width = smart_resize(ref.height, ref.width, factor, size["shortest_edge"], size["longest_edge"])
            grid[row] = 1, height // patch, width // patch
        pixels = np.zeros((0, 3 * processor.temporal_patch_size * patch**2), np.float32)
        return Seen(pixels, grid, tuple((int(w) * patch, int(h) * patch) for _, h, w in grid))

    def encode(self, sample: Sample, images: Sequence[Image] | Seen, last_answer_only: bool = False) -> Encoded:
        """The whole conversation, with labels on every answer, or on the last one only.

        Raises ValueError when the image marks do not fit the images, or a text holds one of the CONTROL tokens.
        """
        seen = images if isinstance(images, Seen) else self.see(images)
        ids, tokens = self._tokens(messages(sample, self.family, seen.sizes), seen.grid, prompt=False)
        labels = self._labels(ids, last_answer_only)
        return Encoded(ids, labels, seen.pixel_values, seen.grid, tokens, seen.sizes)

    def encode_prompt(self, sample: Sample, images: Sequence[Image] | Seen) -> Encoded:
        """What is asked: the conversation up to its last answer, ready for the model to go on. No label is set."""
        seen = images if isinstance(images, Seen) else self.see(images)
        turns = messages(sample, self.family, seen.sizes)
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        turns = turns[: answers[-1]] if answers else turns
        ids, tokens = self._tokens(turns, seen.grid, prompt=True)
        return Encoded(ids, np.full_like(ids, IGNORE), seen.pixel_values, seen.grid, tokens, seen.sizes)

    def encode_claim(self, sample: Sample, images: Sequence[Image] | Seen, answer: str) -> Encoded:
        """The prompt that proposes `answer` to the sample's question, for the match head to judge. No label is set."""
        return self.encode_prompt(claim(sample, answer), images)

    def _tokens(self, turns: list[dict[str, Any]], grid: np.ndarray, prompt: bool) -> tuple[np.ndarray, int]:
        _refuse_control(turns)
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
        marks = np.flatnonzero(ids == self.image_id)
        if len(marks) != len(grid):
            raise ValueError(f"the chat template wrote {len(marks)} image marks for {len(grid)} images")
        counts = np.ones(len(ids), dtype=np.int64)
        counts[marks] = grid.prod(axis=1) // self.image_processor.merge_size**2
        return np.repeat(ids, counts), int(counts[marks].sum())

    def _labels(self, ids: np.ndarray, last_only: bool) -> np.ndarray:
        """The ids from each ``<|im_start|>assistant\\n`` to its ``<|im_end|>``, that end included; else IGNORE."""
        labels = np.full_like(ids, IGNORE)
        width = len(self._start)
        starts = [i for i in np.flatnonzero(ids == self._start[0]) if ids[i : i + width].tolist() == self._start]
        for start in starts[-1:] if last_only else starts:
            ends = np.flatnonzero(ids[start:] == self.end_id)
            stop = start + int(ends[0]) + 1 if len(ends) else len(ids)
            labels[start + width : stop] = ids[start + width : stop]
        return labels


def _refuse_control(turns: list[dict[str, Any]]) -> None:
    for number, turn in enumerate(turns):
        content = turn["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        for token in CONTROL:
            if any(token in text for text in texts):
                raise ValueError(
                    f"turn {number} ({turn['role']}) holds {token}, which only the chat template may write"
                )


def _template(folder: Path) -> str:
    """The chat template of a folder whose tokenizer has none: older hub copies keep it in chat_template.json."""
    path = folder / "chat_template.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: has no chat template (chat_template.jinja, chat_template.json or tokenizer_config)"
        )
    return str(read_json(path)["chat_template"])


def collate(batch: Sequence[Encoded], image_id: int, pad_id: int, left: bool = False) -> dict[str, torch.Tensor]:
    """A batch padded to its longest sample, on the right for training, on the left (`left`) for generation.

    Returns input_ids, attention_mask, mm_token_type_ids (1 on image tokens) and labels of [batch, longest], and, where
    there are images, pixel_values of [sum of patches, dimension] and image_grid_thw of [sum of images, 3].
    """
    import torch

    longest = max(item.length for item in batch)
    ids = np.full((len(batch), longest), pad_id, dtype=np.int64)
    labels = np.full((len(batch), longest), IGNORE, dtype=np.int64)
    mask = np.zeros((len(batch), longest), dtype=np.int64)
    for row, item in enumerate(batch):
        place = slice(longest - item.length, longest) if left else slice(0, item.length)
        ids[row, place], labels[row, place], mask[row, place] = item.input_ids, item.labels, 1
    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": ((ids == image_id) & (mask == 1)).astype(np.int64),
        "labels": labels,
    }
    if any(len(item.grid) for item in batch):
        arrays["pixel_values"] = np.concatenate([item.pixel_values for item in batch])
        arrays["image_grid_thw"] = np.concatenate([item.grid for item in batch])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
