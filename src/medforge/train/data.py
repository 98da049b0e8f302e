"""Samples as the trainer takes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from medforge.dataset import Dataset
from medforge.models.encode import Encoded, Encoder, Seen, collate
from medforge.records import Sample

_SEEN_BYTES = 1 << 30


class EncodedSamples:
    """A map-style data set of encoded samples. Preprocessed images are kept, as many questions share one."""

    def __init__(self, dataset: Dataset, samples: Sequence[Sample], encoder: Encoder) -> None:
        self.dataset, self.samples, self.encoder = dataset, samples, encoder
        self._seen: OrderedDict[tuple[str, ...], Seen] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:
        sample = self.samples[index]
        return self.encoder.encode(sample, self._see(sample))

    def _see(self, sample: Sample) -> Seen:
        key = tuple(ref.sha256 for ref in sample.images)
        if key not in self._seen:
            self._seen[key] = self.encoder.see(self.dataset.images(sample))
            self._bytes += self._seen[key].pixel_values.nbytes
            while self._bytes > _SEEN_BYTES and len(self._seen) > 1:
                _, dropped = self._seen.popitem(last=False)
                self._bytes -= dropped.pixel_values.nbytes
        return self._seen[key]

    def collate(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        """A padded batch, see `medforge.models.encode.collate`."""
        return collate(batch, self.encoder.image_id, self.encoder.pad_id)
