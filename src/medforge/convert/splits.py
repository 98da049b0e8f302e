"""Splits that no image and no study straddles.

Samples that share an image or a study are one group. A group's place is the hash of its name and the seed, so that it
stays in its split when unrelated studies join or leave the source: a test study of the last run does not turn into a
training study of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medforge.config import DataConfig
from medforge.convert.common import UNSPLIT
from medforge.files import sha256_json
from medforge.records import Sample


@dataclass(frozen=True, slots=True)
class Member:
    """What dealing has to know of a sample: its study, the SHA-256 of its images, and the split its source tells."""

    study: str
    images: tuple[str, ...]
    split: str

    @classmethod
    def of(cls, sample: Sample) -> Member:
        """The sample without its text and its image bytes."""
        return cls(sample.study_id, tuple(ref.sha256 for ref in sample.images), sample.split)


def assign(members: Sequence[Member], data: DataConfig, seed: int) -> list[str]:
    """The split of each sample, by the settings.

    `split: by-study` deals all anew; `source` keeps the source's splits, deals the samples that have none, and carves
    a validation split from train where the source has none.
    """
    shares = {"test": data.test_share, "validation": data.validation_share}
    if data.split == "by-study":
        return by_study(members, shares, seed)
    splits = [member.split for member in members]
    _deal_anew(members, splits, UNSPLIT, shares, seed)
    if "validation" not in splits and data.validation_share > 0:
        _deal_anew(members, splits, "train", {"validation": data.validation_share}, seed)
    return splits


def _deal_anew(members: Sequence[Member], splits: list[str], which: str, shares: dict[str, float], seed: int) -> None:
    places = [place for place, split in enumerate(splits) if split == which]
    for place, split in zip(places, by_study([members[place] for place in places], shares, seed), strict=True):
        splits[place] = split


def by_study(members: Sequence[Member], shares: dict[str, float], seed: int) -> list[str]:
    """The split of each sample: `shares` of the groups by name, the rest train.

    No split is left empty as long as there are groups enough; train comes first.
    """
    names = groups(members)
    points = {name: int(sha256_json([seed, name])[:13], 16) / 16**13 for name in set(names)}
    ordered = sorted(points, key=lambda name: (points[name], name))
    dealt: dict[str, str] = {}
    for name in ordered:
        low = 0.0
        dealt[name] = "train"
        for split, share in shares.items():
            if low <= points[name] < low + share:
                dealt[name] = split
            low += share
    for split in ("train", *(split for split, share in shares.items() if share > 0)):
        held: dict[str, list[str]] = {}
        for name in ordered:
            held.setdefault(dealt[name], []).append(name)
        if held and split not in held:
            donor = max(held.values(), key=len)
            if len(donor) > 1 or split == "train":
                dealt[donor[0]] = split
    return [dealt[name] for name in names]


def groups(members: Sequence[Member]) -> list[str]:
    """The name of each sample's group: the smallest of the images (or studies) that hang together with its own."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]  # halve the path
            key = parent[key]
        return key

    for member in members:
        study = root(f"study:{member.study}")
        for image in member.images:
            low, high = sorted((root(f"image:{image}"), study))
            parent[high] = study = low
    return [root(f"study:{member.study}") for member in members]
