"""Answers of one model to a split: greedy generation, the likelihood of the reference answers, and what its task heads
say where it has them.

Batches are fixed by the samples alone, so that a run that was killed goes on where it stopped and leaves the bytes of
an unbroken one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medforge.config import EvaluateConfig, ModelConfig
from medforge.dataset import Dataset, choose
from medforge.evaluate.copies import copies
from medforge.evaluate.judge import Judge
from medforge.evaluate.predictions import Prediction, append, missing, prediction_key, seal
from medforge.files import sha256_json, tree_digest
from medforge.models.claims import wrong_answers
from medforge.models.encode import Encoder
from medforge.models.generate import answer_boxes, answer_text, generate, likelihoods, read_boxes
from medforge.models.load import load_model
from medforge.progress import Progress
from medforge.records import Sample
from medforge.workspace import code_digest, libraries

CLAIM_SEED = 0


def run(
    arm: str,
    model_folder: Path,
    dataset: Path,
    out: Path,
    evaluate: EvaluateConfig,
    model: ModelConfig,
    seed: int,
    work: Path | None = None,
    url: str = "",
) -> dict[str, Any]:
    """Answer `evaluate.split` with the model and leave the predictions, in the data set's order, in the file `out`.

    Rows that `out` holds already are kept. With `url` (s3://…, and a folder `work` to send from) copies go there while
    it grows, and a run whose disk is gone goes on from the newest. Returns {"model": digest, "n", "reused": rows that
    were there already}. Raises ValueError when the split is empty, or the store of the copies cannot be asked.
    """
    data = Dataset.open(dataset)
    split = data.samples(evaluate.split)
    samples = choose(split, evaluate.limit, seed)
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
    identity = sha256_json([keys, code_digest("evaluate"), libraries()])
    place = f"{url.rstrip('/')}/predict-{arm}-{identity[:16]}" if url else ""
    with copies(out, work, place, identity) as kept:
        open_keys = set(missing(out, keys))
        if open_keys:
            answerer = Answerer(model_folder, model, evaluate)
            # of the whole split and by a seed of their own: each arm and each run judges the same claims
            wrong = dict(zip((s.id for s in split), wrong_answers(split, CLAIM_SEED), strict=True))
            left = len(open_keys)
            with Progress(f"answering ({arm})", len(samples), "sample") as progress:
                for numbers in _batches(samples, evaluate.batch_size):
                    if any(keys[n] in open_keys for n in numbers):
                        batch = [samples[n] for n in numbers]
                        claims = [wrong[sample.id] for sample in batch]
                        rows = answerer.answer(arm, data, batch, [keys[n] for n in numbers], claims)
                        fresh = [row for row in rows if row.key in open_keys]
                        append(out, fresh)
                        left -= len(fresh)
                        if kept:
                            kept.note(len(keys) - left)
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
    """A loaded model, with its task heads where it has any, that answers batches."""

    def __init__(self, folder: Path, model: ModelConfig, evaluate: EvaluateConfig) -> None:
        from medforge.models.heads import load_heads, load_task_model  # a module of torch's

        self.encoder = Encoder(folder, model.min_pixels, model.max_pixels)
        self.limit = evaluate.max_new_tokens
        self.judge: Judge | None = None
        if load_heads(folder) is None:
            self.model = load_model(folder, model.dtype)
        else:
            loaded = load_task_model(folder, model.dtype)
            self.model, self.judge = loaded.model, Judge(loaded, self.encoder)

    def answer(
        self,
        arm: str,
        data: Dataset,
        samples: Sequence[Sample],
        keys: Sequence[str],
        wrong: Sequence[str | None],
    ) -> list[Prediction]:
        """The predictions of `samples`, in their order. `wrong` has a certainly wrong answer to each, or None."""
        seen = [self.encoder.see(data.images(sample)) for sample in samples]
        prompts = [self.encoder.encode_prompt(sample, s) for sample, s in zip(samples, seen, strict=True)]
        answers = generate(self.model, self.encoder, prompts, self.limit)
        nlls = likelihoods(self.model, self.encoder, samples, seen)
        told: Sequence[dict[str, Any]] = [{}] * len(samples)
        if self.judge is not None:
            told = self.judge.tell(samples, seen, prompts, [answer.text for answer in answers], wrong)
        family = self.encoder.family
        return [
            Prediction(
                key=key,
                id=sample.id,
                arm=arm,
                question=sample.question,
                reference=answer_text(sample, family, s.sizes),
                prediction=answer.text,
                nll=nll,
                answer_tokens=tokens,
                generated_tokens=answer.tokens,
                finish="stop" if answer.ended else "length",
                answer_type=sample.answer_type,
                question_type=sample.question_type,
                question_type_from=sample.question_type_from,
                language=sample.language,
                boxes=answer_boxes(sample),
                predicted_boxes=read_boxes(answer.text, sample, family, s.sizes),
                images=tuple(ref.sha256 for ref in sample.images),
                **of_heads,
            )
            for key, sample, s, answer, (nll, tokens), of_heads in zip(
                keys, samples, seen, answers, nlls, told, strict=True
            )
        ]
