"""Encoding against the stock transformers processors, and what carries loss."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medforge.models.encode import CONTROL, IGNORE, Encoder, collate
from medforge.models.families import FAMILIES
from medforge.records import Box, ImageRef
from tests.unit.models.examples import picture, sample, token_losses

PIXELS = (56 * 56, 160 * 160)
Message = dict[str, Any]

# the template of Qwen2-VL's own repository, which adds a system turn of its own
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stock_processor(folder: Path, family: str) -> Any:
    """The family's own processor class without its video part, which torchvision would be needed for."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    upstream = getattr(transformers, FAMILIES[family].processor_class)

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        for kind in ("image", "video"):
            setattr(self, f"{kind}_token", f"<|{kind}_pad|>")
            setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    size = {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}
    images = transformers.Qwen2VLImageProcessorPil(patch_size=FAMILIES[family].patch_size, size=size)
    kind = type(upstream.__name__, (upstream,), {"__init__": init})
    return kind(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)


def image(*_: object) -> dict[str, str]:
    return {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


# (turns of the sample, pictures, the same as messages in the stock form)
CASES: list[tuple[list[tuple[str, str]], list[Image.Image], list[Message]]] = [
    (
        [("user", "<image>\nIs there a nodule?"), ("assistant", "yes")],
        [picture(0)],
        [
            {"role": "user", "content": [image(), text("Is there a nodule?")]},
            {"role": "assistant", "content": "yes"},
        ],
    ),
    (  # the marks in the middle and at the end; a tall, a wide and a tiny picture
        [("user", "Compare <image> with <image>, then with\n<image>"), ("assistant", "The second is larger.")],
        [picture(1, 40, 130), picture(2, 300, 90), picture(3, 9, 7)],
        [
            {
                "role": "user",
                "content": [text("Compare "), image(), text(" with "), image(), text(", then with"), image()],
            },
            {"role": "assistant", "content": "The second is larger."},
        ],
    ),
    (  # Chinese, a system turn, two turns with a picture each
        [
            ("system", "你是放射科医生。"),
            ("user", "<image>\n这张图像的成像方式是什么？"),
            ("assistant", "磁共振成像"),
            ("user", "<image>\n病灶在哪里？"),
            ("assistant", "左上肺叶"),
        ],
        [picture(4, 96, 96), picture(5, 200, 150)],
        [
            {"role": "system", "content": "你是放射科医生。"},
            {"role": "user", "content": [image(), text("这张图像的成像方式是什么？")]},
            {"role": "assistant", "content": "磁共振成像"},
            {"role": "user", "content": [image(), text("病灶在哪里？")]},
            {"role": "assistant", "content": "左上肺叶"},
        ],
    ),
    (
        [("user", "What is a CT?"), ("assistant", "Computed tomography")],
        [],
        [
            {"role": "user", "content": [text("What is a CT?")]},
            {"role": "assistant", "content": "Computed tomography"},
        ],
    ),
]


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoder(family: str, tiny_models: dict[str, Path]) -> Encoder:
    return Encoder(tiny_models[family], *PIXELS)


@pytest.fixture(scope="module")
def plain(base: Path) -> Encoder:
    return Encoder(base, *PIXELS)


def assert_same(ours: dict[str, Any], stock: Any) -> None:
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"):
        assert (name in ours) == (name in stock), name
        if name in stock:
            expected = np.asarray(stock[name])
            assert ours[name].shape == expected.shape, name
            np.testing.assert_array_equal(ours[name].numpy(), expected, err_msg=name)


@pytest.mark.parametrize("left", [False, True])
def test_a_batch_is_the_stock_processors(
    family: str, encoder: Encoder, tiny_models: dict[str, Path], left: bool
) -> None:
    stock = stock_processor(tiny_models[family], family)
    texts = [stock.apply_chat_template(messages, tokenize=False) for _, _, messages in CASES]
    pictures = [one for _, images, _ in CASES for one in images]
    side = "left" if left else "right"
    expected = stock(text=texts, images=pictures, padding=True, padding_side=side, return_tensors="np")
    encoded = [encoder.encode(sample(turns, images), images) for turns, images, _ in CASES]
    assert_same(collate(encoded, encoder.image_id, encoder.pad_id, left), expected)


def test_a_batch_without_images_is_the_stock_processors(
    family: str, encoder: Encoder, tiny_models: dict[str, Path]
) -> None:
    turns, _, messages = CASES[-1]
    stock = stock_processor(tiny_models[family], family)
    expected = stock(text=[stock.apply_chat_template(messages, tokenize=False)], return_tensors="np")
    assert_same(collate([encoder.encode(sample(turns), [])], encoder.image_id, encoder.pad_id), expected)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_prompt_is_the_stock_processors(
    family: str, encoder: Encoder, tiny_models: dict[str, Path], number: int
) -> None:
    turns, images, messages = CASES[number]
    stock = stock_processor(tiny_models[family], family)
    asked = stock.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    expected = stock(text=[asked], images=images or None, return_tensors="np")
    prompt = encoder.encode_prompt(sample(turns, images), images)
    assert_same(collate([prompt], encoder.image_id, encoder.pad_id), expected)
    assert prompt.answer_tokens == 0


def test_a_template_beside_the_tokenizer_is_used(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(tiny_models["qwen2-vl"], folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(folder, *PIXELS)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_TEMPLATE}))
    encoder = Encoder(folder, *PIXELS)
    encoded = encoder.encode(sample([("user", "Hello"), ("assistant", "Good day")]), [])
    assert encoder.tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nGood day<|im_end|>\n"
    )
    assert encoder.tokenizer.decode(encoded.labels[encoded.labels != IGNORE]) == "Good day<|im_end|>"


def learnt(encoder: Encoder, encoded: Any) -> str:
    """The text that carries loss; every label must be the token that stands there."""
    kept = encoded.labels != IGNORE
    np.testing.assert_array_equal(encoded.labels[kept], encoded.input_ids[kept])
    return str(encoder.tokenizer.decode(encoded.labels[kept]))


@pytest.mark.parametrize(("turns", "images"), [(turns, images) for turns, images, _ in CASES])
def test_only_answers_and_their_ends_carry_loss(
    encoder: Encoder, turns: list[tuple[str, str]], images: list[Image.Image]
) -> None:
    answers = [f"{words}<|im_end|>" for role, words in turns if role == "assistant"]
    encoded = encoder.encode(sample(turns, images), images)
    assert learnt(encoder, encoded) == "".join(answers)
    assert encoded.answer_tokens == sum(len(encoder.tokenizer.encode(words)) for words in answers)
    assert learnt(encoder, encoder.encode(sample(turns, images), images, last_answer_only=True)) == answers[-1]


def test_padding_carries_no_loss(plain: Encoder) -> None:
    encoded = [plain.encode(sample(turns, images), images) for turns, images, _ in CASES]
    for left in (False, True):
        batch = collate(encoded, plain.image_id, plain.pad_id, left)
        for item, labels, mask in zip(encoded, batch["labels"], batch["attention_mask"], strict=True):
            assert mask.sum() == item.length
            assert (labels[mask == 0] == IGNORE).all()
            np.testing.assert_array_equal(labels[mask == 1].numpy(), item.labels)


@pytest.mark.parametrize("answer", ["assistant\nno", "user\nWhat?\nassistant\nThat.", "[im_start]assistant\nyes"])
def test_text_that_looks_like_a_turn_is_text(plain: Encoder, answer: str) -> None:
    turns = [("user", f"Repeat: {answer}"), ("assistant", answer), ("user", "Again."), ("assistant", "no")]
    assert learnt(plain, plain.encode(sample(turns), [])) == f"{answer}<|im_end|>no<|im_end|>"


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_in_a_text_are_refused(plain: Encoder, token: str) -> None:
    """They would put loss on a user's words, end an answer early, or claim an image that is not there."""
    in_question = sample([("user", f"Say {token}assistant\nyes"), ("assistant", "no")])
    in_answer = sample([("user", "Say"), ("assistant", f"no{token}\nyes")])
    for encode, item in (
        (plain.encode, in_question),
        (plain.encode_prompt, in_question),
        (plain.encode, in_answer),
    ):
        with pytest.raises(ValueError, match=rf"turn \d .* holds {re.escape(token)}"):
            encode(item, [])


letters = st.characters(exclude_categories=["Cs"], exclude_characters="<") | st.sampled_from(
    "\n\r\t \x1c\x85\u200b\u3000a1。."
)
texts = st.text(letters, min_size=1, max_size=30).filter(lambda words: bool(words.strip()))


@settings(max_examples=150, deadline=None)
@given(question=texts, first=texts, second=texts)
def test_any_text_is_kept_and_the_prompt_is_a_prefix(plain: Encoder, question: str, first: str, second: str) -> None:
    turns = [("user", question), ("assistant", first), ("user", question), ("assistant", second)]
    whole = plain.encode(sample(turns), [])
    assert learnt(plain, whole) == f"{first.strip()}<|im_end|>{second.strip()}<|im_end|>"
    prompt = plain.encode_prompt(sample(turns), [])
    last = plain.encode(sample(turns), [], last_answer_only=True)
    start = int(np.flatnonzero(last.labels != IGNORE)[0])
    np.testing.assert_array_equal(prompt.input_ids, whole.input_ids[:start])


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "First?"), ("assistant", "one"), ("user", "A question without an answer")],
        [("user", "First?"), ("assistant", "one"), ("assistant", "two")],
    ],
)
def test_the_prompt_ends_where_the_last_answer_begins(plain: Encoder, turns: list[tuple[str, str]]) -> None:
    last = plain.encode(sample(turns), [], last_answer_only=True)
    start = int(np.flatnonzero(last.labels != IGNORE)[0])
    np.testing.assert_array_equal(plain.encode_prompt(sample(turns), []).input_ids, last.input_ids[:start])


def test_boxes_are_written_for_the_image_they_are_on(encoder: Encoder, family: str) -> None:
    images = [picture(0, 100, 60), picture(1, 60, 100)]
    boxes = [Box("a", (0.1, 0.2, 0.55, 0.9), 0), Box("b", (0.1, 0.2, 0.55, 0.9), 1)]
    turns = [("user", "<image><image>\nWhere?"), ("assistant", "<|box:0|> <|box:1|>")]
    encoded = encoder.encode(sample(turns, images, boxes), images)
    expected = {
        "qwen2-vl": "<|object_ref_start|>a<|object_ref_end|><|box_start|>(100,200),(550,900)<|box_end|> "
        "<|object_ref_start|>b<|object_ref_end|><|box_start|>(100,200),(550,900)<|box_end|>",
        # 112 x 56 and 56 x 112 pixels after resizing
        "qwen2.5-vl": '{"bbox_2d": [11, 11, 62, 50], "label": "a"} {"bbox_2d": [6, 22, 31, 101], "label": "b"}',
        "qwen3-vl": '{"bbox_2d": [100, 200, 550, 900], "label": "a"} {"bbox_2d": [100, 200, 550, 900], "label": "b"}',
    }[family]
    assert learnt(encoder, encoded) == f"{expected}<|im_end|>"
    if family == "qwen2.5-vl":
        assert encoded.sizes == ((112, 56), (56, 112))


def test_images_and_marks_must_agree(plain: Encoder) -> None:
    turns = [("user", "<image>\nWhat?"), ("assistant", "this")]
    with pytest.raises(ValueError, match="1 image marks for 2 images"):
        plain.encode(sample(turns, [picture(0)]), [picture(0), picture(1)])
    with pytest.raises(ValueError, match="1 image marks for 0 images"):
        plain.encode(sample(turns), [])


def test_a_too_elongated_image_is_refused(plain: Encoder) -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        plain.see([picture(0, 402, 2)])


def test_grey_and_transparent_images_are_seen_as_rgb(plain: Encoder) -> None:
    colour = picture(7)
    grey = colour.convert("L")
    np.testing.assert_array_equal(plain.see([grey]).pixel_values, plain.see([grey.convert("RGB")]).pixel_values)
    np.testing.assert_array_equal(plain.see([colour.convert("RGBA")]).pixel_values, plain.see([colour]).pixel_values)


def test_the_pixel_limits_hold(tiny_models: dict[str, Path], family: str) -> None:
    low, high = 80 * 80, 200 * 200
    encoder = Encoder(tiny_models[family], low, high)
    factor = FAMILIES[family].patch_size * 2
    for shape in ((8, 8), (96, 96), (900, 500), (64, 1024)):
        seen = encoder.see([picture(0, *shape)])
        ((width, height),) = seen.sizes
        assert low <= width * height <= high
        assert width % factor == height % factor == 0


def test_seen_images_are_shared(plain: Encoder) -> None:
    turns, images, _ = CASES[0]
    seen, item = plain.see(images), sample(turns, images)
    np.testing.assert_array_equal(plain.encode(item, seen).pixel_values, plain.encode(item, images).pixel_values)
    np.testing.assert_array_equal(plain.encode(item, seen).input_ids, plain.encode(item, images).input_ids)


def refs(images: list[Image.Image]) -> list[ImageRef]:
    return [ImageRef(f"{number:064x}", *one.size) for number, one in enumerate(images)]


@settings(max_examples=40, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(3, 500), st.integers(3, 500)), max_size=3))
def test_measuring_tells_what_seeing_tells(tiny_models: dict[str, Path], shapes: list[tuple[int, int]]) -> None:
    """Without pixels the grid and the sizes are the same, for every family; so is what is encoded with them."""
    images = [Image.new("RGB", shape) for shape in shapes]
    for folder in tiny_models.values():
        encoder = Encoder(folder, *PIXELS)
        seen, measured = encoder.see(images), encoder.measure(refs(images))
        np.testing.assert_array_equal(measured.grid, seen.grid)
        assert measured.grid.dtype == seen.grid.dtype
        assert measured.sizes == seen.sizes
        assert measured.pixel_values.shape == (0, seen.pixel_values.shape[1])
        assert measured.pixel_values.dtype == seen.pixel_values.dtype


@pytest.mark.parametrize(("turns", "images"), [(turns, images) for turns, images, _ in CASES])
def test_a_sample_is_encoded_without_its_pixels(
    encoder: Encoder, turns: list[tuple[str, str]], images: list[Image.Image]
) -> None:
    item = sample(turns, images)
    measured, whole = encoder.encode(item, encoder.measure(refs(images))), encoder.encode(item, images)
    for name in ("input_ids", "labels", "grid"):
        np.testing.assert_array_equal(getattr(measured, name), getattr(whole, name), err_msg=name)
    assert (measured.image_tokens, measured.sizes) == (whole.image_tokens, whole.sizes)
    assert len(measured.pixel_values) == 0


def test_a_too_elongated_image_is_refused_when_measured(plain: Encoder) -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        plain.measure([ImageRef("0" * 64, 402, 2)])


@pytest.mark.parametrize(("language", "label"), [("en", "Proposed answer: "), ("zh", "拟议答案：")])
def test_a_claim_is_asked_and_not_answered(plain: Encoder, language: str, label: str) -> None:
    images = [picture(0)]
    turns = [("system", "Be brief."), ("user", "<image>\nIs there a nodule?"), ("assistant", "no")]
    encoded = plain.encode_claim(sample(turns, images, language=language), images, " yes ")
    marks = "<|image_pad|>" * encoded.image_tokens
    assert plain.tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{marks}<|vision_end|>Is there a nodule?\n{label}yes<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert encoded.answer_tokens == 0
    assert len(encoded.pixel_values) == encoded.grid.prod()


def test_a_claim_does_not_tell_the_right_answer(plain: Encoder) -> None:
    """Two samples that differ in their answers only make the same claim."""
    images = [picture(0)]
    one, other = (
        plain.encode_claim(sample([("user", "<image>\nWhere?"), ("assistant", answer)], images), images, "left lung")
        for answer in ("left lung", "liver")
    )
    np.testing.assert_array_equal(one.input_ids, other.input_ids)


def test_control_tokens_in_a_claim_are_refused(plain: Encoder) -> None:
    item = sample([("user", "Well?"), ("assistant", "no")])
    with pytest.raises(ValueError, match=r"holds <\|im_end\|>"):
        plain.encode_claim(item, [], "yes<|im_end|>")


def test_a_tokenizer_without_the_special_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "broken")
    path = tmp_path / "broken" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|image_pad|>", "<|something|>"))
    config = tmp_path / "broken" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|image_pad|>", "<|something|>"))
    with pytest.raises(ValueError, match=r"lacks <\|image_pad\|>"):
        Encoder(tmp_path / "broken", *PIXELS)


def test_the_models_own_loss_is_the_mean_over_the_answers(
    family: str, encoder: Encoder, tiny_models: dict[str, Path]
) -> None:
    from medforge.models.load import load_model

    model = load_model(tiny_models[family], "float32").cpu()
    encoded = [encoder.encode(sample(turns, images), images) for turns, images, _ in CASES]
    batch = collate(encoded, encoder.image_id, encoder.pad_id)
    losses = [loss for row in token_losses(model, batch) for loss in row]
    assert len(losses) == sum(item.answer_tokens for item in encoded)
    assert float(model(**batch).loss.detach()) == pytest.approx(np.mean(losses), rel=1e-5)
