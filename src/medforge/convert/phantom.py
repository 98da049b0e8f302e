"""The phantom data set: drawings that look a little like scans, with questions in the words of radiology.

It is generated, not medical: it exists to try the whole way on any machine. Each image stands for one study.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from medforge.config import PhantomConfig
from medforge.drawing import Scene, draw, random_scene
from medforge.files import sha256_bytes
from medforge.progress import track
from medforge.records import Box, ImageRef, Sample, Turn, box_mark, sample_id

SOURCE = "phantom (generated drawings, not medical)"
LICENCE = "CC0-1.0"
MODALITIES = ("CT", "MRI", "X-ray")
ORGANS = ("lung", "liver", "brain", "kidney")
COUNTS = ("none", "one", "two", "three")
PLACES = (
    ("upper left", "upper middle", "upper right"),
    ("left", "center", "right"),
    ("lower left", "lower middle", "lower right"),
)
SHARES = (("train", 0.75), ("validation", 0.1), ("test", 0.15))

Question = tuple[str, str, str, str]  # question type, answer type, question, answer


def rows(config: PhantomConfig) -> Iterator[tuple[Sample, list[bytes]]]:
    """The samples and their PNG bytes, split by image; the same configuration gives the same bytes."""
    rng = np.random.default_rng(config.seed)
    splits = _splits(config.images, rng)
    for number in track(range(config.images), "drawing phantoms", unit="image"):
        scene = random_scene(rng)
        data = _png(draw(scene, config.size))
        image = ImageRef(sha256_bytes(data), config.size, config.size)
        boxes = tuple(Box("lesion", spot.xyxy) for spot in scene.spots)
        for question_type, answer_type, question, answer in questions(scene, rng):
            turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
            sample = Sample(
                id=sample_id("phantom", (image,), turns),
                images=(image,),
                turns=turns,
                answer_type=answer_type,
                question_type=question_type,
                language="en",
                study_id=f"phantom-{config.seed}-{number:06d}",
                source=SOURCE,
                licence=LICENCE,
                split=splits[number],
                boxes=boxes,
                target_diagnosis="lesion" if boxes else "no lesion",
            )
            yield sample, [data]


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """What is asked of a scene. Place and box are asked only of a single lesion, where there is one answer."""
    modality, organ = MODALITIES[scene.style], ORGANS[scene.figure]
    other_organ = ORGANS[(scene.figure + 1 + int(rng.integers(len(ORGANS) - 1))) % len(ORGANS)]
    asked_organ = organ if rng.random() < 0.5 else other_organ
    asked: list[Question] = [
        ("modality", "open", "What imaging modality is this?", modality),
        ("organ", "open", "Which organ is shown?", organ),
        ("organ", "closed", f"Does this image show the {asked_organ}?", "yes" if asked_organ == organ else "no"),
        ("abnormality", "closed", "Is there a lesion in this image?", "yes" if scene.spots else "no"),
        ("quantity", "open", "How many lesions are there?", COUNTS[len(scene.spots)]),
    ]
    if len(scene.spots) == 1:
        row, column = scene.spots[0].cell
        asked.append(("position", "open", "Where is the lesion?", PLACES[row][column]))
        asked.append(("grounding", "open", "Give the bounding box of the lesion.", box_mark(0)))
    return asked


def _splits(images: int, rng: np.random.Generator) -> list[str]:
    """A split for each image: the shares in whole images, in an order drawn by the seed, none of them empty."""
    counts = {name: max(1, round(images * share)) for name, share in SHARES[1:]}
    names = [name for name, count in counts.items() for _ in range(count)]
    names += ["train"] * (images - len(names))
    return [names[index] for index in rng.permutation(images)]


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(stream, "PNG")
    return stream.getvalue()
