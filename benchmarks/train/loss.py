"""One neutral judge for all frameworks: the loss of the adapters they wrote, on the same samples, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.train.work import Work

BATCH = 8


def losses(model: Path, data: Path, adapters: Sequence[Path | None], work: Work) -> list[float | str]:
    """The mean loss (nats a token) over the answer tokens of the data set's first `work.scored` samples.

    One for each of `adapters`, None being the base model alone. It is the models' stock forward pass. An adapter that
    cannot be loaded whole has the reason in the place of its loss.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    from medforge.dataset import Dataset
    from medforge.models.encode import IGNORE, Encoder, collate
    from medforge.models.load import load_model

    torch.set_num_threads(work.threads)
    dataset = Dataset.open(data / "medforge")
    encoder = Encoder(model, work.min_pixels, work.max_pixels)
    encoded = [encoder.encode(s, dataset.images(s)) for s in dataset.samples("train")[: work.scored]]
    batches = [
        collate(encoded[start : start + BATCH], encoder.image_id, encoder.pad_id)
        for start in range(0, len(encoded), BATCH)
    ]
    found: list[float | str] = []
    for adapter in adapters:
        network = load_model(model, "float32")
        if adapter is not None:
            try:
                network = PeftModel.from_pretrained(network, str(adapter))
            except (ValueError, RuntimeError, OSError, TypeError) as error:
                found.append(f"the adapter cannot be loaded: {str(error).splitlines()[0]}")
                continue
            # peft only warns of weights that have no place, and leaves their layers as they were
            if lost := set(load_peft_weights(str(adapter))) ^ set(get_peft_model_state_dict(network)):
                found.append(f"{len(lost)} of the adapter's weights do not fit the model; first: {sorted(lost)[0]}")
                continue
        total, tokens = 0.0, 0
        for batch in batches:
            labels = batch["labels"][:, 1:]
            with torch.inference_mode():
                logits = network(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
            kept = labels != IGNORE
            total += float(torch.nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum"))
            tokens += int(kept.sum())
        found.append(total / tokens)
    return found
