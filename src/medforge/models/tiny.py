"""A tiny Qwen-VL, built on the spot: real classes and files, a few million parameters, nothing downloaded.

Adapters cannot teach a random model anything, so it is pre-trained for a minute on drawings under neutral names. It
then sees styles, figures, places and counts, but connects none of them with a word of radiology: that is left to
fine-tuning. Weights get a fan-in initialisation; at the stock 0.02 a model this small hardly learns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medforge.config import TinyConfig
from medforge.drawing import Scene, draw, random_scene
from medforge.files import new_folder, write_json
from medforge.models.families import FAMILIES, Family
from medforge.progress import Progress
from medforge.records import IMAGE_MARK, ImageRef, Sample, Turn

VOCABULARY = 700
IMAGE_SIZE = 96
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# Qwen's own split pattern and template, cut down to what messages with images need
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

STYLES = ("alpha", "beta", "gamma")
FIGURES = ("pair", "wedge", "split", "beans")
PLACES = (("a1", "a2", "a3"), ("b1", "b2", "b3"), ("c1", "c2", "c3"))
# the later words, as text without pictures: a word that was never seen has no embedding to adapt
LATER_WORDS = (
    *("CT", "MRI", "X-ray", "lung", "liver", "brain", "kidney", "none", "one", "two", "three", "yes", "no"),
    *("upper left", "upper middle", "upper right", "left", "center", "right", "lower left", "lower middle"),
    *("lower right", "lesion", "What imaging modality is this?", "Which organ is shown?", "Where is the lesion?"),
    *("Is there a lesion in this image?", "How many lesions are there?", "Give the bounding box of the lesion."),
    *("Does this image show the lung?", "Does this image show the liver?", "Does this image show the brain?"),
    "Does this image show the kidney?",
)


def build(out: Path, family: str, config: TinyConfig) -> dict[str, Any]:
    """Write a tiny model of `family` (qwen2-vl, qwen2.5-vl, qwen3-vl) to the folder `out`.

    Returns {"family", "parameters", "loss": the last steps' mean loss, or None without pre-training}. The same
    arguments give the same bytes on the same machine and thread count.
    """
    import torch

    from medforge.models.determinism import seeded

    kind = FAMILIES[family]
    with new_folder(out) as folder, seeded(config.seed):
        tokenizer = _tokenizer()
        tokenizer.save_pretrained(folder)
        _save_image_processor(folder, kind)
        model = _model(kind, tokenizer)
        model.config.save_pretrained(folder)
        loss = _pretrain(model, folder, config) if config.steps else None
        model.save_pretrained(folder)
        parameters = sum(p.numel() for p in model.parameters())
        about = {
            "family": family,
            "parameters": parameters,
            "loss": loss,
            "torch": str(torch.__version__).split("+")[0],
        }
        write_json(folder / "tiny.json", about | {"config": config.model_dump()})
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes 0600
    return about


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    text = [part for _ in range(300) for pair in _questions(random_scene(rng), rng) for part in pair]
    text += [part for _ in range(300) for part in _text(rng)]
    text += ["system\nuser\nassistant\n"] * 50
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _save_image_processor(folder: Path, family: Family) -> None:
    from transformers import Qwen2VLImageProcessorPil

    size = {"shortest_edge": 56 * 56, "longest_edge": 512 * 512}
    processor = Qwen2VLImageProcessorPil(patch_size=family.patch_size, size=size)
    processor.save_pretrained(folder)
    # the names that AutoProcessor looks for on a machine that has torchvision
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text()) | {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": family.processor_class,
    }
    write_json(path, values)
    video = {"video_processor_type": family.processor_class.replace("Processor", "VideoProcessor").replace("2_5_", "2")}
    shared = {k: values[k] for k in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")}
    write_json(folder / "video_preprocessor_config.json", video | shared | {"size": size})


def _model(family: Family, tokenizer: Any) -> Any:
    import torch
    import transformers

    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]},
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": family.patch_size}
    if family.name == "qwen3-vl":
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"hidden_size": 96, "intermediate_size": 192, "out_hidden_size": 128}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    elif family.name == "qwen2.5-vl":
        vision |= {"hidden_size": 96, "intermediate_size": 192, "out_hidden_size": 128, "fullatt_block_indexes": [1]}
    else:
        vision |= {"embed_dim": 96, "hidden_size": 128, "mlp_ratio": 2}
    if family.name != "qwen3-vl":
        del text["head_dim"]
    classes = getattr(transformers, family.model_class)
    config = classes.config_class(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = classes(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


def _pretrain(model: Any, folder: Path, config: TinyConfig) -> float:
    """Train all weights on drawings and on text. Returns the mean loss of the last 20 steps."""
    import torch

    from medforge.models.encode import Encoder, collate

    encoder = Encoder(folder, IMAGE_SIZE**2, IMAGE_SIZE**2)
    rows = _rows(np.random.default_rng(config.seed), encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, config.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(1.0, step / config.steps))) + 0.01),
    )
    losses: list[float] = []
    model.train()
    with Progress("pre-training the tiny base", config.steps, "step") as progress:
        for _ in range(config.steps):
            batch = collate([next(rows) for _ in range(config.batch_size)], encoder.image_id, encoder.pad_id)
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            progress.advance()
    model.eval()
    return round(sum(losses[-20:]) / len(losses[-20:]), 6)


def _rows(rng: np.random.Generator, encoder: Any) -> Iterator[Any]:
    """Encoded rows without end: a drawing with all its questions as one conversation; every fifth row is text.

    Asking everything at once gives the vision tower several times the signal for the same image; the order is drawn,
    so that each question is also met as the first and only one.
    """
    from PIL import Image

    while True:
        for _ in range(4):
            scene = random_scene(rng)
            turns = [turn for pair in _questions(scene, rng) for turn in pair]
            yield encoder.encode(_sample(turns, 1), [Image.fromarray(draw(scene, IMAGE_SIZE))])
        yield encoder.encode(_sample(list(_text(rng)), 0), [])


def _sample(texts: list[str], images: int) -> Sample:
    """A conversation of `texts`, question and answer in turn, that opens with `images` image marks."""
    turns = tuple(
        Turn("assistant" if number % 2 else "user", IMAGE_MARK * (images if number == 0 else 0) + text)
        for number, text in enumerate(texts)
    )
    refs = (ImageRef("", IMAGE_SIZE, IMAGE_SIZE),) * images
    return Sample("", refs, turns, "open", "drawing", "en", "", "drawing", "CC0-1.0", "train")


def _questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """All neutral questions about a drawing with their answers, in a drawn order."""
    named = int(rng.integers(len(FIGURES)))
    asked = [
        ("style", STYLES[scene.style]),
        ("figure", FIGURES[scene.figure]),
        (f"figure {FIGURES[named]}", "true" if named == scene.figure else "false"),
        ("any spot", "true" if scene.spots else "false"),
        ("count", str(len(scene.spots))),
    ]
    if len(scene.spots) == 1:
        row, column = scene.spots[0].cell
        numbers = " ".join(str(round(value * 1000)) for value in scene.spots[0].xyxy)
        asked += [("place", PLACES[row][column]), ("extent", numbers)]
    return [asked[index] for index in rng.permutation(len(asked))]


def _text(rng: np.random.Generator) -> tuple[str, str]:
    """A later word to repeat, or a box in a family's notation with numbers of no meaning."""
    if rng.random() < 0.8:
        words = LATER_WORDS[int(rng.integers(len(LATER_WORDS)))]
        return f"repeat: {words}", words
    x1, y1, x2, y2 = (int(value) for value in rng.integers(0, 1000, 4))
    if rng.random() < 0.5:
        return "json", f'{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "lesion"}}'
    return "tokens", f"<|object_ref_start|>lesion<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
