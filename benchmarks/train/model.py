"""The benchmark's model: a Qwen2-VL of random weights, small enough for a CPU, whose files every framework reads.

Its vocabulary is small as well. At this width Qwen's 151,936 rows would be most of the model, and a framework that
computes logits at every position would look several times slower than it is at a real width: in Qwen2-VL-2B the
output layer is 15 % of the language model, here it is 12 %. `QWEN` is the same model with Qwen's own vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medforge.files import new_folder, write_json
from medforge.models.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, SPLIT_PATTERN

LEARNED = 1_500  # entries of the tokenizer that the texts use


@dataclass(frozen=True)
class Shape:
    """Sizes of the model.

    `vocabulary` is the number of the embedding's rows; the special tokens stand at `first_special` and after it.
    """

    vocabulary: int = 8_192
    first_special: int = 8_192 - len(SPECIAL_TOKENS)
    hidden: int = 512
    intermediate: int = 2048
    layers: int = 8
    heads: int = 8
    key_value_heads: int = 2
    tower_width: int = 384
    tower_layers: int = 8
    tower_heads: int = 6

    def special_ids(self) -> dict[str, int]:
        """The id of each special token."""
        return {token: self.first_special + number for number, token in enumerate(SPECIAL_TOKENS)}


QWEN = Shape(vocabulary=151_936, first_special=151_643)  # the ids of Qwen2-VL's own tokenizer


def build(out: Path, texts: Iterable[str], shape: Shape, max_pixels: int, seed: int) -> dict[str, Any]:
    """Write the model, its tokenizer and its processor to the folder `out`.

    `texts` is what the tokenizer learns from. Returns the shape and the numbers of parameters; "vocabulary"
    are those of the embedding, which is also the output layer. The same arguments give the same weights.
    """
    from medforge.models.determinism import seeded

    with new_folder(out) as folder, seeded(seed):
        tokenizer = build_tokenizer(texts, shape)
        tokenizer.save_pretrained(folder)
        _save_processor(folder, max_pixels)
        model = _model(shape)
        model.save_pretrained(folder)
        return {
            "family": "qwen2-vl",
            "shape": asdict(shape),
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": shape.vocabulary * shape.hidden,
        }


def build_tokenizer(texts: Iterable[str], shape: Shape) -> Any:
    """A byte-level BPE learned from `texts`, filled up with unused entries to where the special tokens stand."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=LEARNED, initial_alphabet=alphabet, show_progress=False)
    )
    bpe = json.loads(learned.to_str())["model"]
    vocabulary = bpe["vocab"]
    # no merge leads to these, and the space keeps a text from matching one: bytes never spell a plain space
    vocabulary |= {f"unused {number}": number for number in range(len(vocabulary), shape.first_special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in bpe["merges"]]))
    tokenizer.pre_tokenizer = learned.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))  # they get the ids after the vocabulary's last
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32_768,
    )


def _save_processor(folder: Path, max_pixels: int) -> None:
    """The processor's settings under the names of the files that Qwen publishes."""
    size = {"shortest_edge": 56 * 56, "longest_edge": max_pixels}
    values = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],  # CLIP's, as in every Qwen-VL
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": size,
        "min_pixels": size["shortest_edge"],
        "max_pixels": max_pixels,
    }
    write_json(folder / "preprocessor_config.json", values)
    video = {name: value for name, value in values.items() if name not in ("image_processor_type", "processor_class")}
    write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor"} | video)


def _model(shape: Shape) -> Any:
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = shape.special_ids()
    sixth = shape.hidden // shape.heads // 8
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "max_position_embeddings": 32_768,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            # Qwen2-VL's shares of a head for time, height and width: 2 : 3 : 3 of its half
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [sixth, 3 * sixth // 2, 3 * sixth // 2],
            },
        },
        vision_config={
            "depth": shape.tower_layers,
            "embed_dim": shape.tower_width,
            "hidden_size": shape.hidden,
            "num_heads": shape.tower_heads,
            "mlp_ratio": 4,
            "patch_size": 14,
        },
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2VLForConditionalGeneration(config)
    for module in model.modules():  # fan-in: at the stock 0.02 so small a model hardly learns
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    return model
