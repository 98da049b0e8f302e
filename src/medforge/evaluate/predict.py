"""Answers of one model to a split: greedy generation, and the likelihood of the reference answers.

Batches are fixed by the samples alone, so that a run that was killed goes on where it stopped and leaves the bytes of
an unbroken one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medforge.config import EvaluateConfig, ModelConfig
from medforge.dataset import Dataset, choose
from medforge.evaluate.predictions import Prediction, append, missing, prediction_key, seal
from medforge.files import tree_digest
from medforge.models.encode import IGNORE, Encoder, Seen, collate
from medforge.models.load import load_model
from medforge.models.prompts import parse_boxes, render_box
from medforge.progress import Progress
from medforge.records import BOX_MARK, Sample


def run(
    arm: str, model_folder: Path, dataset: Path, out: Path, evaluate: EvaluateConfig, model: ModelConfig, seed: int
) -> dict[str, Any]:
    """Answer `evaluate.split` with the model and leave the predictions, in the data set's order, in the file `out`.

    Rows that `out` holds already are kept. Returns {"model": digest, "n", "reused": rows that were there already}.
    Raises ValueError when the split is empty.
    """
    data = Dataset.open(dataset)
    samples = choose(data.samples(evaluate.split), evaluate.limit, seed)
    if not samples:
        raise ValueError(f"{dataset}: the {evaluate.split} split, which is to be scored, is empty")
    digest = tree_digest(model_folder)
    settings = {
        "min_pixels": model.min_pixels,
        "max_pixels": model.max_pixels,
        "dtype": model.dtype,
        "max_new_tokens": evaluate.max_new_tokens,
        "batch_size": evaluate.batch_size,
        "data": data.digest,
    }
    keys = [prediction_key(sample.id, arm, digest, settings) for sample in samples]
    open_keys = set(missing(out, keys))
    if open_keys:
        answerer = Answerer(model_folder, model, evaluate)
        with Progress(f"answering ({arm})", len(samples), "sample") as progress:
            for numbers in _batches(samples, evaluate.batch_size):
                wanted = [n for n in numbers if keys[n] in open_keys]
                if wanted:
                    rows = answerer.answer(arm, data, [samples[n] for n in numbers], [keys[n] for n in numbers])
                    append(out, [row for row in rows if row.key in open_keys])
                progress.advance(len(numbers))
    seal(out, keys)
    return {"model": digest, "n": len(keys), "reused": len(keys) - len(open_keys)}


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Sample numbers in batches of like length: by image size and question length, ties by number."""

    def cost(number: int) -> tuple[int, int, int]:
        sample = samples[number]
        pixels = sum(ref.width * ref.height for ref in sample.images)
        return pixels, sum(len(turn.text) for turn in sample.turns), number

    order = sorted(range(len(samples)), key=cost)
    for start in range(0, len(order), size):
        yield order[start : start + size]


class Answerer:
    """A loaded model that answers batches."""

    def __init__(self, folder: Path, model: ModelConfig, evaluate: EvaluateConfig) -> None:
        self.encoder = Encoder(folder, model.min_pixels, model.max_pixels)
        self.model = load_model(folder, model.dtype).eval()
        self.limit = evaluate.max_new_tokens

    def answer(self, arm: str, data: Dataset, samples: Sequence[Sample], keys: Sequence[str]) -> list[Prediction]:
        """The predictions of `samples`, in their order."""
        seen = [self.encoder.see(data.images(sample)) for sample in samples]
        texts, lengths, ended = self._generate(samples, seen)
        likelihoods = self._likelihoods(samples, seen)
        rows = []
        for number, sample in enumerate(samples):
            size = seen[number].sizes[0] if seen[number].sizes else (1000, 1000)
            nll, tokens = likelihoods[number]
            rows.append(
                Prediction(
                    key=keys[number],
                    id=sample.id,
                    arm=arm,
                    question=sample.question,
                    reference=_reference(sample, self.encoder, seen[number]),
                    prediction=texts[number],
                    nll=nll,
                    answer_tokens=tokens,
                    generated_tokens=lengths[number],
                    finish="stop" if ended[number] else "length",
                    answer_type=sample.answer_type,
                    question_type=sample.question_type,
                    question_type_from=sample.question_type_from,
                    language=sample.language,
                    boxes=tuple(sample.boxes[int(m.group(1))].xyxy for m in BOX_MARK.finditer(sample.answer)),
                    predicted_boxes=tuple(parse_boxes(texts[number], self.encoder.family, size)),
                    images=tuple(ref.sha256 for ref in sample.images),
                )
            )
        return rows

    def _generate(self, samples: Sequence[Sample], seen: Sequence[Seen]) -> tuple[list[str], list[int], list[bool]]:
        """Greedy answers, their lengths in tokens without the end token, and whether they ended by themselves."""
        import torch

        prompts = [self.encoder.encode_prompt(sample, s) for sample, s in zip(samples, seen, strict=True)]
        batch = collate(prompts, self.encoder.image_id, self.encoder.pad_id, left=True)
        del batch["labels"]
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            output = self.model.generate(
                **batch,
                max_new_tokens=self.limit,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self.encoder.end_id,
                pad_token_id=self.encoder.pad_id,
            )
        texts, lengths, ended = [], [], []
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            stop = row.index(self.encoder.end_id) if self.encoder.end_id in row else len(row)
            texts.append(self._text(row[:stop]))
            lengths.append(stop)
            ended.append(stop < len(row))
        return texts, lengths, ended

    def _text(self, tokens: list[int]) -> str:
        """Tokens as text. Box tokens are part of an answer, padding is not."""
        kept = [token for token in tokens if token != self.encoder.pad_id]
        return str(self.encoder.tokenizer.decode(kept, skip_special_tokens=False)).strip()

    def _likelihoods(self, samples: Sequence[Sample], seen: Sequence[Seen]) -> list[tuple[float, int]]:
        """For each sample the sum of -ln p over the last answer's tokens, its end token included, and their number.

        Logits are taken at answer positions only, and in float32.
        """
        import torch

        whole = [self.encoder.encode(sample, s, last_answer_only=True) for sample, s in zip(samples, seen, strict=True)]
        batch = collate(whole, self.encoder.image_id, self.encoder.pad_id)
        labels = batch.pop("labels")[:, 1:]
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        kept = labels != IGNORE
        with torch.inference_mode():
            hidden = self.model.model(**batch).last_hidden_state[:, :-1][kept.to(self.model.device)]
            logits = self.model.lm_head(hidden).float()
            losses = torch.nn.functional.cross_entropy(logits, labels[kept].to(logits.device), reduction="none").cpu()
        counts = kept.sum(1).tolist()
        return [(float(part.double().sum()), n) for part, n in zip(losses.split(counts), counts, strict=True)]


def _reference(sample: Sample, encoder: Encoder, seen: Seen) -> str:
    """The answer as the model should have written it: boxes in its family's notation."""

    def text(match: Any) -> str:
        box = sample.boxes[int(match.group(1))]
        return render_box(box, encoder.family, seen.sizes[box.image])

    return BOX_MARK.sub(text, sample.answer)
