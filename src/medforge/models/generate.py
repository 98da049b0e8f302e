"""What a loaded model answers, how likely it finds an answer, and the state that its task heads read.

The model may be in any state of training: it is put into evaluation for the length of a call and left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medforge.metrics.boxes import XYXY
from medforge.models.encode import IGNORE, Encoded, Encoder, Seen, collate
from medforge.models.families import Family
from medforge.models.prompts import Size, parse_boxes, render_box
from medforge.records import BOX_MARK, Sample

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, its length in tokens without the end token, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def generate(
    model: Any, encoder: Encoder, prompts: Sequence[Encoded], max_new_tokens: int, **extra: Any
) -> list[Answer]:
    """The greedy answers to `prompts` (of `Encoder.encode_prompt`), in their order, as one batch.

    `extra` goes to the model's own `generate`; DeepSpeed ZeRO-3 needs ``synced_gpus=True``.
    """
    batch, _ = _batch(model, encoder, prompts, left=True)
    with _answering(model):
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=encoder.end_id,
            pad_token_id=encoder.pad_id,
            **extra,
        )
    answers = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        stop = row.index(encoder.end_id) if encoder.end_id in row else len(row)
        answers.append(Answer(decode(encoder, row[:stop]), stop, stop < len(row)))
    return answers


def decode(encoder: Encoder, tokens: Sequence[int]) -> str:
    """An answer's tokens as text. Box tokens are part of an answer, padding is not."""
    kept = [token for token in tokens if token != encoder.pad_id]
    return str(encoder.tokenizer.decode(kept, skip_special_tokens=False)).strip()


def likelihoods(
    model: Any, encoder: Encoder, samples: Sequence[Sample], seen: Sequence[Seen]
) -> list[tuple[float, int]]:
    """For each sample the sum of -ln p over the last answer's tokens, its end token included, and their number.

    Logits are taken at answer positions only, and in float32.
    """
    import torch

    whole = [encoder.encode(sample, s, last_answer_only=True) for sample, s in zip(samples, seen, strict=True)]
    batch, labels = _batch(model, encoder, whole)
    labels = labels[:, 1:]
    kept = labels != IGNORE
    with _answering(model):
        hidden = _states(model, batch)[:, :-1]
        logits = _core(model).lm_head(hidden[kept.to(hidden.device)]).float()
        losses = torch.nn.functional.cross_entropy(logits, labels[kept].to(logits.device), reduction="none").cpu()
    counts = kept.sum(1).tolist()
    return [(float(part.double().sum()), n) for part, n in zip(losses.split(counts), counts, strict=True)]


def pooled(model: Any, encoder: Encoder, prompts: Sequence[Encoded]) -> torch.Tensor:
    """The state that the task heads read: float32 of [prompts, hidden], on the model's device.

    It is the language model's output after its last norm at each prompt's last token: never an answer's token, which
    would tell the heads what they are to find, and never padding.
    """
    import torch

    batch, _ = _batch(model, encoder, prompts)
    with _answering(model):
        states = _states(model, batch)
        last = torch.tensor([prompt.length - 1 for prompt in prompts], device=states.device)
        return states[torch.arange(len(prompts), device=states.device), last].float()


def answer_text(sample: Sample, family: Family, sizes: Sequence[Size]) -> str:
    """The sample's answer as the model should write it: boxes in its family's notation. `sizes` as in `Encoded`."""

    def text(match: Any) -> str:
        box = sample.boxes[int(match.group(1))]
        return render_box(box, family, sizes[box.image])

    return BOX_MARK.sub(text, sample.answer)


def answer_boxes(sample: Sample) -> tuple[XYXY, ...]:
    """The boxes that the sample's answer names, in their order."""
    return tuple(sample.boxes[int(match.group(1))].xyxy for match in BOX_MARK.finditer(sample.answer))


def boxed_image(sample: Sample) -> int:
    """The number of the image that a box in an answer is about: the one that all boxes of the reference answer are
    on, or all boxes of the sample where the answer names none; the first where they are on several, or there is none.

    A model's box does not say which image it means, and a family that writes pixels needs that image's size.
    """
    named = [sample.boxes[int(match.group(1))] for match in BOX_MARK.finditer(sample.answer)]
    images = {box.image for box in named or sample.boxes}
    return images.pop() if len(images) == 1 else 0


def region_target(sample: Sample) -> XYXY | None:
    """What the region head is to find: the sample's box on its first image, where there is exactly one, whether the
    answer names it or not; else None."""
    boxes = [box.xyxy for box in sample.boxes if box.image == 0]
    return boxes[0] if len(boxes) == 1 else None


def read_boxes(text: str, sample: Sample, family: Family, sizes: Sequence[Size]) -> tuple[XYXY, ...]:
    """The boxes that `text`, a model's answer to the sample, holds, as shares of the image that `boxed_image` names."""
    size = sizes[boxed_image(sample)] if sizes else (1000, 1000)
    return tuple(parse_boxes(text, family, size))


def _batch(
    model: Any, encoder: Encoder, items: Sequence[Encoded], left: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The inputs of one padded batch on the model's device, and its labels."""
    batch = collate(items, encoder.image_id, encoder.pad_id, left=left)
    labels = batch.pop("labels")
    return {name: tensor.to(model.device) for name, tensor in batch.items()}, labels


def _core(model: Any) -> Any:
    """The Qwen-VL model itself: peft's wrapper has attributes of the same names that mean others."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _states(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The language model's output after its last norm: [batch, longest, hidden]."""
    states: torch.Tensor = _core(model).model(**batch).last_hidden_state
    return states


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients for the length of a block; each module's own mode is restored after it.

    no_grad rather than inference_mode: what a model keeps between calls (DeepSpeed's gathered weights, buffers) must
    stay usable by autograd.
    """
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
