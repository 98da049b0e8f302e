"""One run of the language model over a batch of rows, with image features from wherever they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medforge.models.rows import Batch
from medforge.models.tower import Levels

if TYPE_CHECKING:
    import torch


def hidden_states(model: Any, batch: Batch, features: Sequence[Levels], flex: bool = False) -> torch.Tensor:
    """The final hidden states of [batch, longest, width].

    `features` are the images' levels after the merger, in the order of `batch.images`. With `flex`, the model must
    have been set to flex_attention; the rows' mask is then a block mask.
    """
    import torch

    language = model.model.language_model
    embeds = language.embed_tokens(batch.input_ids)
    extra: dict[str, Any] = {}
    if features:
        levels = [torch.cat(parts).to(embeds.dtype) for parts in zip(*features, strict=True)]
        # Qwen's image embeddings replace those of the image tokens
        embeds = embeds.masked_scatter(batch.image_mask[..., None], levels[0])
        if len(levels) > 1:
            extra = {"visual_pos_masks": batch.image_mask, "deepstack_visual_embeds": levels[1:]}
    mask = block_mask(batch) if flex and batch.branched else batch.visible
    return language(
        inputs_embeds=embeds, position_ids=batch.position_ids, attention_mask=mask, use_cache=False, **extra
    ).last_hidden_state


def block_mask(batch: Batch) -> Any:
    """`batch.visible` as FlexAttention's BlockMask: blocks that nothing sees are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    from medforge.models.rows import PADDING

    rows, segments = batch.rows, batch.segments

    def visible(b: Any, _: Any, query: Any, key: Any) -> Any:
        own = segments[b, query] == segments[b, key]
        prefix = (segments[b, key] == 0) & (segments[b, query] != PADDING)
        return (own | prefix) & (rows[b, query] == rows[b, key]) & (query >= key)

    lines, length = rows.shape
    return create_block_mask(visible, lines, None, length, length, device=rows.device)


def answer_losses(model: Any, hidden: torch.Tensor, batch: Batch, answer_logits: bool = True) -> torch.Tensor:
    """-ln p of each of `batch.targets`, in float32. Logits are made at their places only, or everywhere."""
    import torch

    if answer_logits:
        logits = model.lm_head(hidden.flatten(0, 1)[batch.predict])
    else:
        logits = model.lm_head(hidden).flatten(0, 1)[batch.predict]
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
