"""Rows: what one run of the language model reads. Questions about the same image share one row, exactly.

A row holds the prefix that its samples have in common (the images, segment 0) once, and after it what is each
sample's own (segments 1, 2, …). A token sees the prefix and its own segment, causally, and keeps the position that it
has in the sample alone; so every branch computes what it would compute alone, and the gradients of the prefix add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medforge.models.encode import IGNORE, Encoded

if TYPE_CHECKING:
    import torch

PADDING = -1


@dataclass(frozen=True)
class Item:
    """An encoded sample or claim. `images` names its images by content, `tag` is the caller's own."""

    encoded: Encoded
    images: tuple[str, ...]
    tag: Any = None

    @property
    def prompt_end(self) -> int:
        """Index of the last token before the last answer: of the last token where there is no answer."""
        labelled = np.flatnonzero(self.encoded.labels != IGNORE)
        if not len(labelled):
            return self.encoded.length - 1
        breaks = np.flatnonzero(np.diff(labelled) > 1)
        start = labelled[breaks[-1] + 1] if len(breaks) else labelled[0]
        return int(start) - 1


@dataclass(frozen=True)
class Row:
    """A prefix with its branches. All arrays but `positions` ([3, length]) and `grid` are one-dimensional.

    `predict` are the places whose next token carries loss, `targets` those tokens, `taps` the last prompt token of
    each item, in the order of `items`.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    predict: np.ndarray
    targets: np.ndarray
    taps: np.ndarray
    grid: np.ndarray
    items: tuple[Item, ...]

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.ids)

    @property
    def images(self) -> tuple[str, ...]:
        """The images, by content."""
        return self.items[0].images


def positions(ids: np.ndarray, grid: np.ndarray, image_id: int, merge: int) -> np.ndarray:
    """M-RoPE positions (time, height, width) of [3, length], as `get_rope_index` of all three families has them.

    Text counts up in all three; an image's tokens take their place in its grid, and the text after it goes on at the
    greatest position + 1 (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    found = np.empty((3, len(ids)), dtype=np.int64)
    place, start = 0, 0
    images = iter(grid)
    while place < len(ids):
        if ids[place] == image_id:
            _, height, width = (int(value) for value in next(images))
            rows, columns = height // merge, width // merge
            stop = place + rows * columns
            found[0, place:stop] = start
            found[1, place:stop] = start + np.repeat(np.arange(rows), columns)
            found[2, place:stop] = start + np.tile(np.arange(columns), rows)
            start += max(rows, columns)
        else:
            following = np.flatnonzero(ids[place:] == image_id)
            stop = place + (int(following[0]) if len(following) else len(ids) - place)
            found[:, place:stop] = start + np.arange(stop - place)
            start += stop - place
        place = stop
    return found


def make_row(items: Sequence[Item], image_id: int, merge: int) -> Row:
    """One row of items that have the same images, or of a single item."""
    sequences = [item.encoded for item in items]
    shared = _common(items, image_id) if len(items) > 1 else 0
    places = [positions(encoded.input_ids, encoded.grid, image_id, merge) for encoded in sequences]
    ids, where, segments = [sequences[0].input_ids[:shared]], [places[0][:, :shared]], [np.zeros(shared, np.int64)]
    predict, targets, taps = [], [], []
    start = shared
    for number, (item, encoded, place) in enumerate(zip(items, sequences, places, strict=True), start=1):
        labelled = np.flatnonzero(encoded.labels != IGNORE)
        # the last answer's end is predicted, never read, and what the template writes after it is neither
        stop = int(labelled[-1]) if len(labelled) else encoded.length
        own = encoded.input_ids[shared:stop]
        shift = start - shared
        ids.append(own)
        where.append(place[:, shared:stop])
        segments.append(np.full(len(own), number, np.int64))
        predict.append(labelled - 1 + shift)
        targets.append(encoded.labels[labelled])
        taps.append(item.prompt_end + shift)
        start += len(own)
    return Row(
        ids=np.concatenate(ids),
        positions=np.concatenate(where, axis=1),
        segments=np.concatenate(segments),
        predict=np.concatenate(predict),
        targets=np.concatenate(targets),
        taps=np.asarray(taps, np.int64),
        grid=sequences[0].grid,
        items=tuple(items),
    )


def _common(items: Sequence[Item], image_id: int) -> int:
    """The length of the prefix that all items share; 0 where it does not hold all images.

    It ends before the first token that predicts an answer, and before each item's last prompt token, so that every
    place that carries loss or is pooled stands in its own branch.
    """
    first = items[0].encoded.input_ids
    length = min(_own_start(item) for item in items)
    for item in items[1:]:
        same = first[:length] == item.encoded.input_ids[:length]
        length = length if same.all() else int(np.argmin(same))
    return length if int((first[:length] == image_id).sum()) == items[0].encoded.image_tokens else 0


def _own_start(item: Item) -> int:
    labelled = np.flatnonzero(item.encoded.labels != IGNORE)
    return min(item.prompt_end, int(labelled[0]) - 1 if len(labelled) else item.prompt_end)


def cut(
    items: Sequence[Item], image_id: int, merge: int, tokens: int, share: bool, buckets: bool, packed: bool
) -> list[list[Row]]:
    """Micro-batches of rows: each at most `tokens` when padded to its longest row, or in sum when `packed`.

    With `share`, items of the same images become one row, as far as `tokens` allows; with `buckets`, rows of like
    length stand together. A single item that is longer than `tokens` gets a micro-batch of its own.
    """
    rows = list(_rows(items, image_id, merge, tokens, share))
    if buckets:
        rows.sort(key=lambda row: -row.length)  # stable, so that the order is the items' alone
    batches: list[list[Row]] = []
    size = longest = 0
    for row in rows:
        longest = max(longest, row.length)
        size = size + row.length if packed else (len(batches[-1]) + 1 if batches else 1) * longest
        if not batches or size > tokens:
            batches.append([])
            longest, size = row.length, row.length
        batches[-1].append(row)
    return batches


def _rows(items: Sequence[Item], image_id: int, merge: int, tokens: int, share: bool) -> Iterator[Row]:
    groups: dict[Any, list[Item]] = {}
    for number, item in enumerate(items):
        key = item.images if share and item.images else number
        groups.setdefault(key, []).append(item)
    for group in groups.values():
        while group:
            shared = _common(group, image_id) if len(group) > 1 else 0
            count, length = 1, group[0].encoded.length
            while shared and count < len(group) and length + group[count].encoded.length - shared <= tokens:
                length += group[count].encoded.length - shared
                count += 1
            yield make_row(group[:count], image_id, merge)
            group = group[count:]


@dataclass(frozen=True)
class Batch:
    """A micro-batch as tensors. [batch, longest] unless told otherwise; flat indexes go over batch x longest.

    `position_ids` is [3, batch, longest]; `rows` and `segments` say who sees whom; `branched` whether any row has
    several branches or several rows stand in one sequence, so that a plain causal mask is not enough.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    segments: torch.Tensor
    branched: bool
    image_mask: torch.Tensor
    grid: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    taps: torch.Tensor
    items: tuple[Item, ...]
    images: tuple[str, ...]
    real_tokens: int

    def to(self, device: Any) -> Batch:
        """The same batch on `device`."""
        from dataclasses import fields, replace

        import torch

        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {n: t.to(device, non_blocking=True) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
        return replace(self, **moved)

    @property
    def visible(self) -> torch.Tensor | None:
        """Which key (last axis) each token sees, bool of [batch, 1, longest, longest]; None for plain causal.

        Padding sees padding, so that no row of the mask is empty.
        """
        import torch

        if not self.branched:
            return None
        own = self.segments[:, :, None] == self.segments[:, None, :]
        prefix = (self.segments == 0)[:, None, :] & (self.segments != PADDING)[:, :, None]
        same_row = self.rows[:, :, None] == self.rows[:, None, :]
        causal = torch.ones(self.rows.shape[1], self.rows.shape[1], dtype=torch.bool, device=self.rows.device).tril()
        return ((own | prefix) & same_row & causal)[:, None]


def collate_rows(rows: Sequence[Row], image_id: int, pad_id: int, packed: bool = False) -> Batch:
    """The rows as one batch: padded on the right, or end to end in one sequence."""
    import torch

    lengths = [row.length for row in rows]
    shape = (1, sum(lengths)) if packed else (len(rows), max(lengths))
    ids = np.full(shape, pad_id, np.int64)
    numbers = np.zeros(shape, np.int64)
    segments = np.full(shape, PADDING, np.int64)
    places = np.zeros((3, *shape), np.int64)
    starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(rows)) * shape[1]
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        line, first = (0, int(start)) if packed else (number, 0)
        to = (line, slice(first, first + row.length))
        ids[to], segments[to], numbers[to] = row.ids, row.segments, number
        places[:, line, first : first + row.length] = row.positions
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(places),
        rows=torch.from_numpy(numbers),
        segments=torch.from_numpy(segments),
        branched=(packed and len(rows) > 1) or any(len(row.items) > 1 for row in rows),
        image_mask=torch.from_numpy((ids == image_id) & (segments != PADDING)),
        grid=torch.from_numpy(np.concatenate([row.grid for row in rows])),
        predict=torch.from_numpy(np.concatenate([row.predict + s for row, s in zip(rows, starts, strict=True)])),
        targets=torch.from_numpy(np.concatenate([row.targets for row in rows])),
        taps=torch.from_numpy(np.concatenate([row.taps + s for row, s in zip(rows, starts, strict=True)])),
        items=tuple(item for row in rows for item in row.items),
        images=tuple(image for row in rows for image in row.images),
        real_tokens=sum(lengths),
    )
