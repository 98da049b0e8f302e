"""Generation, likelihoods and pooled states against the model used one sample at a time, in any state of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medforge.dataset import Dataset
from medforge.models.encode import Encoded, Encoder, collate
from medforge.models.families import FAMILIES
from medforge.models.generate import (
    answer_boxes,
    answer_text,
    boxed_image,
    decode,
    generate,
    likelihoods,
    pooled,
    read_boxes,
    region_target,
)
from medforge.models.load import load_model
from medforge.records import Box, Sample
from tests.unit.models.examples import picture, sample, token_losses

LIMIT = 8
PIXELS = (56 * 56, 112 * 112)


@pytest.fixture(scope="module")
def samples(phantoms: Path) -> list[Sample]:
    """Questions of unlike length, about several images."""
    return sorted(Dataset.open(phantoms).samples("test"), key=lambda s: (len(s.question), s.id))[::7]


@pytest.fixture(scope="module")
def encoder(base: Path) -> Encoder:
    return Encoder(base, *PIXELS)


@pytest.fixture(scope="module")
def seen(phantoms: Path, samples: list[Sample], encoder: Encoder) -> list[Any]:
    return [encoder.see(Dataset.open(phantoms).images(s)) for s in samples]


@pytest.fixture(scope="module")
def prompts(samples: list[Sample], seen: list[Any], encoder: Encoder) -> list[Encoded]:
    found = [encoder.encode_prompt(s, images) for s, images in zip(samples, seen, strict=True)]
    assert len({prompt.length for prompt in found}) > 2  # else no batch would be padded
    return found


@pytest.fixture
def model(base: Path) -> Any:
    return load_model(base, "float32").cpu()


def with_adapter(model: Any) -> Any:
    """The model under an adapter that does something."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = r".*language_model\.layers\.\d+\.self_attn\.[qv]_proj"
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.5))


def alone(model: Any, encoder: Encoder, prompt: Encoded) -> dict[str, Any]:
    """The outputs of `model.generate` and `model()` for one prompt, without any padding."""
    import torch

    batch = collate([prompt], encoder.image_id, encoder.pad_id)
    del batch["labels"]
    model.eval()
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=LIMIT, do_sample=False, eos_token_id=encoder.end_id)
        logits = model(**batch).logits[0, -1]
    return {"tokens": ids[0, prompt.length :].tolist(), "logits": logits}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_batch_says_what_each_prompt_alone_says(
    model: Any, encoder: Encoder, prompts: list[Encoded], wrapped: bool
) -> None:
    import torch

    model = with_adapter(model) if wrapped else model
    expected = [alone(model, encoder, prompt) for prompt in prompts]
    answers = generate(model, encoder, prompts, LIMIT)
    for answer, lone in zip(answers, expected, strict=True):
        tokens = lone["tokens"]
        assert answer.ended == (tokens[-1] == encoder.end_id)
        assert answer.tokens == len(tokens) - answer.ended
        assert answer.text == decode(encoder, tokens[: answer.tokens])
    head = model.get_base_model().lm_head if wrapped else model.lm_head
    states = pooled(model, encoder, prompts)
    assert states.dtype == torch.float32
    with torch.no_grad():
        logits = head(states)
    # what stands after the last norm at the prompt's last token is what the first answer token is chosen by
    torch.testing.assert_close(logits, torch.stack([lone["logits"] for lone in expected]), rtol=1e-4, atol=1e-4)


def test_likelihoods_are_of_the_adapted_model_in_evaluation(
    model: Any, encoder: Encoder, samples: list[Sample], seen: list[Any]
) -> None:
    plain = likelihoods(model, encoder, samples, seen)
    model = with_adapter(model).train()
    found = likelihoods(model, encoder, samples, seen)
    assert found == likelihoods(model.eval(), encoder, samples, seen)  # dropout was off
    for (nll, tokens), (other, _), s, images in zip(found, plain, samples, seen, strict=True):
        encoded = encoder.encode(s, images, last_answer_only=True)
        (losses,) = token_losses(model, collate([encoded], encoder.image_id, encoder.pad_id))
        assert nll == pytest.approx(sum(losses), rel=1e-4) and nll != pytest.approx(other, rel=1e-3)
        assert tokens == len(losses) == len(encoder.tokenizer.encode(answer_text(s, encoder.family, images.sizes))) + 1


def test_training_goes_on_as_if_nothing_had_been_asked(
    model: Any, encoder: Encoder, prompts: list[Encoded], samples: list[Sample], seen: list[Any]
) -> None:
    """The modes of all modules, the random state and the gradients are as without the calls in between."""
    import torch

    model = with_adapter(model)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model.get_base_model().model.visual.eval()
    modes = [module.training for module in model.modules()]
    batch = collate([encoder.encode(samples[0], seen[0])], encoder.image_id, encoder.pad_id)

    def gradients() -> list[Any]:
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.manual_seed(3)
    expected = gradients()
    torch.manual_seed(3)
    generate(model, encoder, prompts, LIMIT)
    likelihoods(model, encoder, samples, seen)
    assert not pooled(model, encoder, prompts).requires_grad
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2 and expected
    for one, other in zip(expected, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_mode_is_restored_when_generation_fails(model: Any, encoder: Encoder, prompts: list[Encoded]) -> None:
    model.train()
    with pytest.raises((TypeError, ValueError), match="no_such_option"):
        generate(model, encoder, prompts, LIMIT, no_such_option=1)
    assert all(module.training for module in model.modules())


def test_more_arguments_reach_the_models_own_generate(model: Any, encoder: Encoder, prompts: list[Encoded]) -> None:
    first = generate(model, encoder, prompts[:1], LIMIT)[0]
    assert first.tokens > 1
    shorter = generate(model, encoder, prompts[:1], LIMIT, max_time=0.0)[0]
    assert shorter.tokens <= 1


def test_box_tokens_are_part_of_an_answer_and_padding_is_not(encoder: Encoder) -> None:
    words = "<|object_ref_start|>lesion<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    assert decode(encoder, [*encoder.tokenizer.encode(words), encoder.pad_id]) == words


FIRST, SECOND = Box("old", (0.1, 0.2, 0.3, 0.4)), Box("new", (0.5, 0.5, 0.75, 0.625), image=1)
SIZES = ((100, 60), (400, 800))


def asked(answer: str, *boxes: Box) -> Sample:
    turns = [("user", "<image> then <image>\nWhere is it now?"), ("assistant", answer)]
    return sample(turns, [picture(0), picture(1, 40, 80)], boxes)


@pytest.mark.parametrize(
    ("boxed", "image"),
    [
        (asked("there: <|box:0|>", SECOND), 1),
        (asked("there: <|box:1|>", FIRST, SECOND), 1),  # the answer's box, not the question's
        (asked("<|box:0|> and <|box:1|>", FIRST, SECOND), 0),
        (asked("in the lung", SECOND), 1),
        (asked("in the lung", FIRST, SECOND), 0),
        (asked("in the lung"), 0),
    ],
)
def test_a_written_box_is_read_in_the_size_of_the_image_that_it_is_about(boxed: Sample, image: int) -> None:
    assert boxed_image(boxed) == image
    width, height = SIZES[image]
    expected = (40 / width, 30 / height, 80 / width, 60 / height)
    said = '[{"bbox_2d": [40, 30, 80, 60], "label": "it"}]'
    assert read_boxes(said, boxed, FAMILIES["qwen2.5-vl"], SIZES) == (pytest.approx(expected),)
    # the families that count in thousandths need no size
    assert read_boxes(said, boxed, FAMILIES["qwen3-vl"], SIZES) == ((0.04, 0.03, 0.08, 0.06),)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_as_it_should_be_written_is_read_back(family: str) -> None:
    boxed = asked("there: <|box:1|>", FIRST, SECOND)
    written = answer_text(boxed, FAMILIES[family], SIZES)
    assert written.startswith("there: ") and "<|box:" not in written
    (box,) = read_boxes(written, boxed, FAMILIES[family], SIZES)
    assert box == pytest.approx(SECOND.xyxy, abs=1e-3)
    assert answer_boxes(boxed) == (SECOND.xyxy,)


def test_text_without_an_image_has_boxes_in_thousandths() -> None:
    plain = sample([("user", "Where?"), ("assistant", "here")])
    assert read_boxes("[100, 200, 300, 400]", plain, FAMILIES["qwen2.5-vl"], ()) == ((0.1, 0.2, 0.3, 0.4),)


def test_the_region_to_find_is_the_one_box_of_the_first_image() -> None:
    assert region_target(asked("lung", FIRST)) == FIRST.xyxy
    assert region_target(asked("lung", FIRST, SECOND)) == FIRST.xyxy
    assert region_target(asked("lung", FIRST, Box("more", (0, 0, 1, 1)))) is None
    assert region_target(asked("lung", SECOND)) is None
    assert region_target(asked("lung")) is None
