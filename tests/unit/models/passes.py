"""Items of several samples, and their losses and gradients: by medforge's rows, and by the stock model one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image

from medforge.models.encode import IGNORE, Encoded, Encoder, collate
from medforge.models.families import FAMILIES, lora_targets
from medforge.models.rows import Batch, Item, collate_rows, cut
from medforge.records import ImageRef, Sample, Turn
from tests.unit.models.examples import picture, sample

PIXELS = (56 * 56, 400 * 400)
MERGE = 2
PICTURES: dict[str, Image] = {
    "a": picture(0, 100, 60),
    "b": picture(1, 60, 130),
    "large": picture(2, 336, 224),  # more than one of Qwen2.5-VL's windows of 112 px, and not square
}


@dataclass(frozen=True)
class Case:
    """An item without pixels, as rows take it, and the same sample with pixels, as the stock model takes it."""

    item: Item
    whole: Encoded


def about(images: Sequence[str], *turns: str) -> Sample:
    """A conversation whose `turns` are the user's and the assistant's by turns; the first shows `images`."""
    roles = ("user", "assistant")
    said = [(roles[number % 2], text) for number, text in enumerate(turns)]
    if images:
        said[0] = ("user", "<image>" * len(images) + "\n" + said[0][1])
    made = sample(said)
    refs = tuple(ImageRef(name, *PICTURES[name].size) for name in images)
    return Sample(**(vars(made) | {"images": refs, "turns": tuple(Turn(*turn) for turn in said)}))


def case(encoder: Encoder, images: Sequence[str], *turns: str, tag: Any = None) -> Case:
    """The case of `about(images, *turns)`."""
    made = about(images, *turns)
    plain = encoder.encode(made, encoder.measure(made.images))
    return Case(Item(plain, tuple(images), tag), encoder.encode(made, [PICTURES[name] for name in images]))


def some_cases(encoder: Encoder) -> list[Case]:
    """Four questions about one image (one of two turns, one asked twice), one about another, two about both, and a
    text alone."""
    asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        (("a",), ("Is there a nodule?", "no")),
        (("b",), ("Which organ is this?", "the liver")),
        (("a",), ("Where is the lesion?", "upper left lobe")),
        (("a", "b"), ("What changed?", "The lesion grew.")),
        ((), ("What is a CT?", "Computed tomography")),
        (("a",), ("What is shown?", "a lung", "Is it the left one?", "yes, the left lung")),
        (("a", "b"), ("Which is older?", "the first")),
        (("a",), ("Is there a nodule?", "no")),
    ]
    return [case(encoder, images, *turns) for images, turns in asked]


def adapted(model: Any, family: str, tune: Sequence[str] = ("vision_merger", "language_attention")) -> Any:
    """The model under peft with random adapters of rank 2: with B at 0, as usual, A would get no gradient."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = list(lora_targets(model, FAMILIES[family], tune))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config)


def stock(model: Any) -> Any:
    """The Hugging Face model under peft."""
    return model.base_model.model


def batches(
    encoder: Encoder,
    items: Sequence[Item],
    tokens: int = 100_000,
    share: bool = True,
    packed: bool = False,
    buckets: bool = True,
) -> list[Batch]:
    """The items as micro-batches."""
    rows = cut(items, encoder.image_id, MERGE, tokens, share, buckets, packed)
    return [collate_rows(micro, encoder.image_id, encoder.pad_id, packed) for micro in rows]


def pixels(encoder: Encoder, images: Iterable[str]) -> Any:
    """The patches of the images, one after another."""
    import torch

    return torch.from_numpy(np.concatenate([encoder.see([PICTURES[name]]).pixel_values for name in images]))


def seen(model: Any, encoder: Encoder, batch: Batch) -> list[Any]:
    """The image features of a batch, by the tower, with gradients."""
    from medforge.models.tower import Tower

    return Tower(model).after(pixels(encoder, batch.images), batch.grid) if batch.images else []


def row_losses(model: Any, encoder: Encoder, batch: Batch, answer_logits: bool = True, flex: bool = False) -> Any:
    """The batch's losses, one a target, by medforge's own forward."""
    from medforge.models.forward import answer_losses, hidden_states

    hidden = hidden_states(model, batch, seen(model, encoder, batch), flex)
    return answer_losses(model, hidden, batch, answer_logits)


def stock_loss(model: Any, encoder: Encoder, whole: Sequence[Encoded]) -> Any:
    """The sum of -ln p over all labelled tokens of one padded batch, by the stock model's own forward."""
    import torch

    batch = collate(whole, encoder.image_id, encoder.pad_id)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    kept = labels != IGNORE
    return torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")


def gradients(model: Any) -> dict[str, Any]:
    """The gradients of what is trained, which are then cleared; every one must be there."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name], parameter.grad = parameter.grad, None
    return found


def distance(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The greatest relative difference of a tensor's gradient, by the 2-norm."""
    assert set(found) == set(expected)
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
