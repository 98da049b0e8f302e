"""`medforge capacity`: GPU hours, memory and storage of a fine-tuning, by arithmetic. Nothing here is measured."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = float(1 << 30)

# text part (hidden, intermediate, layers, heads, key-value heads, vocabulary) and whether the output layer is the word
# embedding; from the config.json of Qwen/Qwen2-VL-{2B,7B,72B}-Instruct
_SHAPES = {
    "qwen2-vl-2b": ((1536, 8960, 28, 12, 2, 151936), True),
    "qwen2-vl-7b": ((3584, 18944, 28, 28, 4, 152064), False),
    "qwen2-vl-72b": ((8192, 29568, 80, 64, 8, 152064), False),
}
_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "vocab_size")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What of a model decides on arithmetic and bytes. Counts are of parameters; `trained` are the adapters'."""

    total: int
    language: int
    tower: int
    head: int
    trained: int
    layers: int
    width: int
    kept_width: int
    vocabulary: int
    patch: int
    merge: int
    tuned_tower: bool


@dataclass(frozen=True)
class Work:
    """The data and the run. `pixels` are those of an image as the model sees it, bytes those of its file."""

    samples: int
    questions: int
    pixels: int
    image_bytes: int
    question_tokens: int
    answer_tokens: int
    epochs: float
    micro_tokens: int
    devices: int
    zero3: bool
    peak: float
    mfu: float
    releases: int
    context: int
    concurrency: int


@dataclass(frozen=True)
class Line:
    """One figure, in `unit`, and the arithmetic that it comes from."""

    what: str
    value: float
    unit: str
    how: str


def shape(model: str, tune: Sequence[str], rank: int) -> Shape:
    """The shape of a folder's model, of which only config.json is read, or of one of the names in `_SHAPES`.

    Raises ValueError for another one.
    """
    import torch
    import transformers

    from medforge.models.families import FAMILIES, family_of, lora_targets
    from medforge.train.throughput import Size

    if model in _SHAPES:
        family = FAMILIES["qwen2-vl"]
        values, tied = _SHAPES[model]
        config = transformers.Qwen2VLConfig(
            text_config=dict(zip(_TEXT, values, strict=True)),
            vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": values[0]},
            tie_word_embeddings=tied,
        )
    elif Path(model).is_dir():
        family = family_of(Path(model))
        config = transformers.AutoConfig.from_pretrained(model)
    else:
        raise ValueError(f"MODEL: {model!r} is no folder with a config.json, nor one of {', '.join(_SHAPES)}")
    with torch.device("meta"):  # shapes without memory
        built = getattr(transformers, family.model_class)(config)
    size, linear = Size.of(built), dict(built.named_modules())
    layers = [linear[name] for name in lora_targets(built, family, tune)]
    text, vision = config.text_config, config.vision_config
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        total=sum(parameter.numel() for parameter in built.parameters()),
        language=size.language,
        tower=size.tower,
        head=size.head,
        trained=sum(rank * (layer.in_features + layer.out_features) for layer in layers),
        layers=size.layers,
        width=size.width,
        kept_width=text.num_key_value_heads * width,
        vocabulary=text.vocab_size,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        tuned_tower=any(".visual.blocks." in f".{name}" for name in lora_targets(built, family, tune)),
    )


def estimate(model: Shape, work: Work) -> list[Line]:
    """GPU hours, memory of a device in training, storage, and memory of a server, as docs/capacity.md derives them."""
    return [*_training(model, work), *_storage(model, work), *_serving(model, work)]


def _training(model: Shape, work: Work) -> list[Line]:
    images, patches = math.ceil(work.samples / work.questions), work.pixels / model.patch**2
    seen = patches / model.merge**2  # tokens of an image
    asked = work.question_tokens + work.answer_tokens
    tokens = seen + work.questions * asked  # of a row: an image and its questions
    pairs = seen * (seen + 1) / 2 + work.questions * (asked * (asked + 1) / 2 + asked * seen)
    row = (
        4 * model.language * tokens
        + 12 * model.layers * model.width * pairs
        + 4 * model.head * work.questions * work.answer_tokens
    )
    looks = 4 * work.epochs if model.tuned_tower else 2  # of a frozen tower the features are kept
    total = images * (work.epochs * row + looks * model.tower * patches)
    hours = total / (work.peak * work.mfu) / 3600
    share = 1 if not work.zero3 else work.devices
    weights, states = 2 * model.total / share, 16 * model.trained / share
    activations = work.micro_tokens * model.width * (2 * model.layers + 34)
    logits = 10 * work.micro_tokens * model.vocabulary * work.questions * work.answer_tokens / tokens
    held = weights + states + activations + logits
    return [
        Line("tokens of an image", seen, "", f"{work.pixels} pixels / ({model.patch} x {model.merge})^2"),
        Line("tokens of an epoch", images * tokens, "", f"{images} images x (image + questions x {asked})"),
        Line(
            "arithmetic", total / 1e15, "PFLOP", "forward and backward, adapters only; what is recomputed not counted"
        ),
        Line("GPU hours", hours, "h", f"at {work.mfu:.0%} of {work.peak / 1e12:.0f} TFLOP/s: an assumption"),
        Line("hours on all devices", hours / work.devices, "h", f"{work.devices} devices, if they share perfectly"),
        Line(
            "weights, a device", weights / GIB, "GiB", "2 bytes each" + (f" / {share} by ZeRO-3" if share > 1 else "")
        ),
        Line("adapter, a device", states / GIB, "GiB", "16 bytes each: float32 weight, gradient, two moments"),
        Line("activations, a device", activations / GIB, "GiB", "micro_tokens x width x (2 x layers + 34)"),
        Line("logits, a device", logits / GIB, "GiB", "10 bytes x vocabulary x answer tokens of a micro-batch"),
        Line("training, a device", held / GIB, "GiB", "their sum; leave a quarter of the device free"),
    ]


def _storage(model: Shape, work: Work) -> list[Line]:
    images = math.ceil(work.samples / work.questions)
    patches = work.pixels / model.patch**2
    source = images * work.image_bytes
    features = 0.0 if model.tuned_tower else 2 * images * patches / model.merge**2 * model.width
    adapter, checkpoint, merged = 4 * model.trained, 12 * model.trained, 2 * model.total
    workspace = 3 * source + features + adapter + 3 * checkpoint + 2 * merged
    kept = source + (1 + work.releases) * merged
    return [
        Line("model, merged", merged / GIB, "GiB", "2 bytes a parameter"),
        Line("adapter", adapter / GIB, "GiB", "4 bytes a trained parameter"),
        Line("checkpoint", checkpoint / GIB, "GiB", "12 bytes a trained parameter: weight, two moments"),
        Line("data set", source / GIB, "GiB", f"{images} images x {work.image_bytes} bytes"),
        Line("image features", features / GIB, "GiB", "2 bytes x image tokens x width, kept for the stage"),
        Line("disk of a run", workspace / GIB, "GiB", "3 x data, features, adapter, 3 checkpoints, base and merged"),
        Line("object store", kept / GIB, "GiB", f"data, base, {work.releases} releases of a merged model each"),
    ]


def _serving(model: Shape, work: Work) -> list[Line]:
    token = 2 * 2 * model.layers * model.kept_width
    cache = token * work.context * work.concurrency
    weights = 2 * model.total
    return [
        Line("keys and values of a token", token / 1024, "KiB", "2 x 2 bytes x layers x key-value width"),
        Line("key-value cache", cache / GIB, "GiB", f"{work.concurrency} requests of {work.context} tokens"),
        Line("serving", (weights + cache) / GIB, "GiB", "weights and cache; leave a tenth of the device free"),
    ]


def add(commands: Any) -> None:
    """Declare `capacity`."""
    top = commands.add_parser("capacity", help="estimate GPU hours, memory and storage of a run: arithmetic only")
    top.add_argument("model", metavar="MODEL", help=f"a folder with a config.json, or one of {', '.join(_SHAPES)}")
    number = top.add_argument
    number("--samples", type=_count, default=20_000, metavar="N", help="questions in training (%(default)s)")
    number("--questions-per-image", type=_count, default=5, metavar="N", help="of an image (%(default)s)")
    number("--pixels", type=_count, default=448 * 448, metavar="N", help="of an image as it is seen (%(default)s)")
    number("--image-bytes", type=_count, default=200_000, metavar="N", help="of an image's file (%(default)s)")
    number("--question-tokens", type=_count, default=40, metavar="N", help="with the chat's frame (%(default)s)")
    number("--answer-tokens", type=_count, default=20, metavar="N", help="of an answer (%(default)s)")
    number("--epochs", type=_share(1e6), default=3.0, metavar="N", help="(%(default)s)")
    number("--tune", default="language_attention,language_mlp", metavar="PARTS", help="as in a stage (%(default)s)")
    number("--rank", type=_count, default=16, metavar="R", help="of the adapters (%(default)s)")
    number("--micro-tokens", type=_count, default=8192, metavar="N", help="as in a stage (%(default)s)")
    number("--devices", type=_count, default=1, metavar="N", help="GPUs in training (%(default)s)")
    number("--zero3", action="store_true", help="weights and optimizer are dealt out over the devices")
    number("--peak-tflops", type=_share(1e6), default=989.0, metavar="N",
           help="of a device; the default is an H100 SXM's dense bfloat16, from its data sheet")  # fmt: skip
    number("--mfu", type=_share(1.0), default=0.3, metavar="SHARE", help="of the peak, assumed (%(default)s)")
    number("--releases", type=_count, default=10, metavar="N", help="releases that are kept (%(default)s)")
    number("--context", type=_count, default=2048, metavar="TOKENS", help="of a request in serving (%(default)s)")
    number("--concurrency", type=_count, default=16, metavar="N", help="requests at once in serving (%(default)s)")
    top.set_defaults(run=_capacity)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _share(most: float) -> Any:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and up to {most:g}")
        return value

    return read


def _capacity(arguments: argparse.Namespace) -> None:
    from medforge.stages import PARTS, REGEX

    a = arguments
    tune = [part for part in a.tune.split(",") if part]
    if unknown := [part for part in tune if part not in PARTS and not part.startswith(REGEX)]:
        raise ValueError(f"--tune: {', '.join(unknown)} is none of {', '.join(PARTS)}, nor re:<regular expression>")
    if a.zero3 and a.devices == 1:
        raise ValueError("--zero3 has no effect on one device; give --devices")
    work = Work(
        samples=a.samples, questions=a.questions_per_image, pixels=a.pixels, image_bytes=a.image_bytes,
        question_tokens=a.question_tokens, answer_tokens=a.answer_tokens, epochs=a.epochs, micro_tokens=a.micro_tokens,
        devices=a.devices, zero3=a.zero3, peak=a.peak_tflops * 1e12, mfu=a.mfu, releases=a.releases, context=a.context,
        concurrency=a.concurrency,
    )  # fmt: skip
    model = shape(a.model, tune, a.rank)
    print(f"{a.model}: {model.total / 1e9:.2f} billion parameters, of the adapters {model.trained / 1e6:.1f} million")
    for line in estimate(model, work):
        print(f"  {line.what:<27}{line.value:>12,.4g} {line.unit:<6}{line.how}")
    print("This is arithmetic, not a measurement: docs/capacity.md has the formulas and what they leave out.")
