"""The samples, in each framework's own format: the same questions, answers and image files for all.

Whole images are drawn, with all their questions, as a training run on the whole set meets them: to draw questions
one by one would leave fewer of them to an image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medforge.config import DataConfig, PhantomConfig
from medforge.convert import run as convert
from medforge.dataset import Dataset
from medforge.dataset_writer import DatasetWriter, image_name
from medforge.files import new_folder, write_atomic, write_json
from medforge.records import BOX_MARK, IMAGE_MARK, Sample

PHANTOM = PhantomConfig(images=120, size=448)
# LLaMA-Factory's data/README.md: a sharegpt set whose tags are OpenAI's
DATASET_INFO = {
    "file_name": "llamafactory.json",
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


def prepare(vqa_rad: Path, out: Path) -> Dataset:
    """VQA-RAD from the folder `vqa_rad`, or generated phantoms where there is none, as a data set in `out`."""
    if vqa_rad.is_dir():
        convert(str(vqa_rad), out, DataConfig(source=str(vqa_rad), format="vqa-rad"))
    else:
        convert("phantom", out, DataConfig(source="phantom", phantom=PHANTOM))
    return Dataset.open(out)


def choose_images(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` of `samples`: all questions of images drawn by `seed`; of the last image as many as still fit.

    Answers that are boxes are left out: each framework has its own notation for them. Raises ValueError when there
    are fewer samples.
    """
    by_image: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        if not any(BOX_MARK.search(turn.text) for turn in sample.turns):
            by_image.setdefault(tuple(ref.sha256 for ref in sample.images), []).append(sample)
    groups = list(by_image.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    chosen = [sample for index in order for sample in groups[index]][:count]
    if len(chosen) < count:
        raise ValueError(f"--samples {count}: the train split has only {len(chosen)} that can be used")
    return chosen


def write(dataset: Dataset, samples: Sequence[Sample], out: Path) -> None:
    """Write `samples` to the folder `out` in every framework's format.

    `out/medforge` is a data set, `out/images` the encoded files as they are, `out/dataset_info.json` and
    `out/llamafactory.json` are LLaMA-Factory's, `out/ms-swift.jsonl` is ms-swift's.
    """
    with new_folder(out) as folder:
        manifest = dataset.manifest
        with DatasetWriter(folder / "medforge", manifest["source"], manifest["licence"], "benchmark") as writer:
            for sample in samples:
                writer.add(sample.with_split("train"), [dataset.image_bytes(ref) for ref in sample.images])
        names: dict[str, str] = {}
        for ref in (ref for sample in samples for ref in sample.images):
            data = dataset.image_bytes(ref)
            names[ref.sha256] = f"images/{image_name(ref.sha256, data)}"
            write_atomic(folder / names[ref.sha256], data)
        images = [[names[ref.sha256] for ref in sample.images] for sample in samples]
        rows = [{"messages": messages(s), "images": files} for s, files in zip(samples, images, strict=True)]
        write_json(folder / "llamafactory.json", rows)
        write_json(folder / "dataset_info.json", {"benchmark": DATASET_INFO})
        # ms-swift looks for relative names in the folder that it is started in
        lines = [
            json.dumps({"messages": messages(s), "images": [str(out.resolve() / file) for file in files]})
            for s, files in zip(samples, images, strict=True)
        ]
        write_atomic(folder / "ms-swift.jsonl", "".join(f"{line}\n" for line in lines))


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The sample's turns as both frameworks take them. MedForge puts no line break after an image, so nor here."""
    texts = [turn.text.strip().replace(f"{IMAGE_MARK}\n", IMAGE_MARK) for turn in sample.turns]
    return [{"role": turn.role, "content": text} for turn, text in zip(sample.turns, texts, strict=True)]
