"""What two splits share: an image or a study on both sides makes a score better than the model is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from medforge.records import Sample

PAIRS = (("train", "test"), ("validation", "test"), ("train", "validation"))


class Holdings:
    """The images and studies of each split, gathered sample by sample."""

    def __init__(self) -> None:
        self.images: dict[str, set[str]] = {}
        self.studies: dict[str, set[str]] = {}

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Holdings:
        """What these samples hold."""
        held = cls()
        for sample in samples:
            held.images.setdefault(sample.split, set()).update(ref.sha256 for ref in sample.images)
            held.studies.setdefault(sample.split, set()).add(sample.study_id)
        return held

    def shares(self, sample: Sample, split: str) -> str | None:
        """What the sample has in common with `split`: image, study, or None."""
        if any(ref.sha256 in self.images.get(split, ()) for ref in sample.images):
            return "image"
        return "study" if sample.study_id in self.studies.get(split, ()) else None


def report(samples: Sequence[Sample], held: Holdings, reject: bool) -> list[dict[str, Any]]:
    """For each pair of splits that both hold samples: shared images and studies, the samples touched, and advice.

    `reject` says that the samples that share with test are going to be rejected: then nothing is left to advise.
    """
    found = []
    for one, other in PAIRS:
        if one not in held.studies or other not in held.studies:
            continue
        images = held.images[one] & held.images[other]
        studies = held.studies[one] & held.studies[other]
        touched = {
            split: sum(
                sample.split == split
                and (sample.study_id in studies or any(ref.sha256 in images for ref in sample.images))
                for sample in samples
            )
            for split in (one, other)
        }
        mended = reject and other == "test"
        found.append(
            {
                "splits": [one, other],
                "shared_images": len(images),
                "shared_studies": len(studies),
                "samples": touched,
                "rejected": touched[one] if mended else 0,
                "advice": None if mended else _advice(one, other, touched),
            }
        )
    return found


def _advice(one: str, other: str, touched: dict[str, int]) -> str | None:
    if not any(touched.values()):
        return None
    mend = "convert again with data.split=by-study"
    if other == "test":
        mend += f", or set data.shared_images=reject to drop the {touched[one]} {one} samples"
        return f"{touched[other]} test samples show what the model saw in {one}, so scores flatter it: {mend}"
    return f"{touched[other]} {other} samples show what the model saw in {one}, so their loss flatters it: {mend}"
