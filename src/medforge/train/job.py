"""What a stage reads, writes and obeys, as one value that travels to its processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from medforge.config import CheckpointConfig, ModelConfig, ParallelConfig, StageConfig
from medforge.files import sha256_json, tree_digest
from medforge.models.load import stack


@dataclass(frozen=True)
class Inputs:
    """What a stage reads. `adapters` is the stack of the stages before it, or None for the first."""

    base: Path
    dataset: Path
    adapters: Path | None


class Job(BaseModel):
    """One stage to train. `work` keeps checkpoints, `logs` what differs from run to run, `features` the tower's."""

    model_config = ConfigDict(frozen=True)

    base: Path
    dataset: Path
    adapters: Path | None
    out: Path
    work: Path
    logs: Path
    features: Path
    stage: StageConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    seed: int

    @property
    def before(self) -> list[Path]:
        """The adapters of the stages before. ValueError when this stage is among them."""
        found = stack(self.adapters)
        if any(path.name[3:] == self.stage.name for path in found):
            raise ValueError(f"stage {self.stage.name!r} is in {self.adapters} already")
        return found

    @property
    def max_pixels(self) -> int:
        """The largest image in this stage."""
        return self.stage.max_pixels or self.model.max_pixels

    def identity(self, data_digest: str) -> str:
        """The digest of all that decides the result: a checkpoint of another identity is not gone on from."""
        return sha256_json(
            {
                "base": tree_digest(self.base),
                "before": {path.name: tree_digest(path) for path in self.before},
                "data": data_digest,
                "stage": self.stage.decisive(),
                "seeing": [self.model.min_pixels, self.max_pixels, self.model.dtype],
                "seed": self.seed,
            }
        )
