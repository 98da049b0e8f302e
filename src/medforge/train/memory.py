"""Running out of memory: which setting to lower, and to what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from medforge.stages import StageConfig


@contextmanager
def advised(stage: StageConfig, doing: str, tokens: int, longest_row: int, longest_sample: int) -> Iterator[None]:
    """Turn a lack of memory in the block into a ValueError that says which setting to lower by how much.

    `tokens` is what is processed at once, padding included, in rows of up to `longest_row`; `longest_sample` is what no
    smaller batch can get below. Any other error passes.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        lower = max(16, tokens // 2)
        advice = f"lower micro_tokens from {stage.micro_tokens} to {lower}"
        if lower < longest_sample:
            advice = (
                f"one sample alone has {longest_sample} tokens: halve max_pixels, or set speed.checkpoint_activations "
                f"to on, and micro_tokens to {longest_sample}"
            )
        raise ValueError(
            f"stage {stage.name!r}: out of memory while {doing} {tokens} tokens at once (longest row {longest_row}): "
            f"{advice}. ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None


def sizes(batches: Sequence[Any]) -> tuple[int, int, int]:
    """Of the largest of some `Batch`es: its tokens, its rows' length; and the tokens of the longest sample in any."""
    return (
        max(batch.input_ids.numel() for batch in batches),
        max(batch.input_ids.shape[1] for batch in batches),
        max(item.encoded.length for batch in batches for item in batch.items),
    )
