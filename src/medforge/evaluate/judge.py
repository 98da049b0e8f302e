"""What a model's task heads say of samples: where the finding is, and whether a claim fits the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medforge.evaluate.predictions import HEADS
from medforge.models.claims import claimable
from medforge.models.encode import CONTROL, Encoded, Encoder, Seen
from medforge.models.generate import pooled, region_target
from medforge.records import BOX_MARK, IMAGE_MARK, Sample

if TYPE_CHECKING:
    import torch

    from medforge.models.heads import TaskModel


class Judge:
    """A model and its task heads."""

    def __init__(self, loaded: TaskModel, encoder: Encoder) -> None:
        self.model, self.heads, self.encoder = loaded.model, loaded.heads, encoder
        self.names = tuple(name for name in HEADS if getattr(loaded.heads, f"{name}_head") is not None)

    def tell(
        self,
        samples: Sequence[Sample],
        seen: Sequence[Seen],
        prompts: Sequence[Encoded],
        answers: Sequence[str],
        wrong: Sequence[str | None],
    ) -> list[dict[str, Any]]:
        """For each sample the fields `heads` and what follows it of `Prediction`.

        prompts: the samples' questions. answers: what the model answered. wrong: certainly wrong answers, or None.
        """
        import torch

        from medforge.models.heads import to_xyxy  # a module of torch's

        rows: list[dict[str, Any]] = [{"heads": self.names} for _ in samples]
        with torch.no_grad():
            if "region" in self.names:
                boxes = to_xyxy(self.heads.region(pooled(self.model, self.encoder, prompts))).clamp(0, 1)
                for row, sample, box in zip(rows, samples, boxes.tolist(), strict=True):
                    row["region"] = tuple(box) if sample.images else None  # cut at the image's edges
                    row["region_target"] = region_target(sample)
            if "match" in self.names:
                references = [sample.answer for sample in samples]
                for name, claims in (("match", answers), ("match_reference", references), ("match_wrong", wrong)):
                    for row, score in zip(rows, self._match(samples, seen, claims), strict=True):
                        row[name] = score
        return rows

    def _match(
        self, samples: Sequence[Sample], seen: Sequence[Seen], claims: Sequence[str | None]
    ) -> list[float | None]:
        """The probability that each claim fits its sample's image, None where there is no claim to judge."""
        judged = [
            number
            for number, (sample, claim) in enumerate(zip(samples, claims, strict=True))
            if claim is not None and claimable(sample) and _is_words(claim)
        ]
        scores: list[float | None] = [None] * len(samples)
        if judged:
            prompts = [self.encoder.encode_claim(samples[n], seen[n], str(claims[n])) for n in judged]
            logits: torch.Tensor = self.heads.match(pooled(self.model, self.encoder, prompts))
            for number, score in zip(judged, logits.sigmoid().tolist(), strict=True):
                scores[number] = score
        return scores


def _is_words(text: str) -> bool:
    """Whether a text can be a claim: a model may answer nothing, or write the marks of turns, images and boxes."""
    marked = any(token in text for token in (*CONTROL, IMAGE_MARK)) or BOX_MARK.search(text)
    return bool(text.strip()) and not marked
