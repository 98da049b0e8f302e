"""What is asked becomes what the model is asked, or is refused with a reason that names the field."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medforge.models.encode import CONTROL
from medforge.models.generate import generate, pooled
from medforge.records import IMAGE_MARK, Turn
from serving.predictor import plane as module
from serving.predictor.errors import Refusal
from serving.predictor.generation import Done, Generation, Piece
from serving.predictor.plane import Ask, Begun, Plane, check_text, forged, read_image
from tests.unit.models.examples import picture, sample
from tests.unit.predictor.examples import QUESTIONS, ask, file, metric, planes


def prepared(generation: Generation, asked: Ask, **options: Any) -> Any:
    """The job that is made of what is asked."""

    async def run() -> Any:
        async with planes(generation, **options) as plane:
            return plane.prepare(asked)

    return asyncio.run(run())


def refused(generation: Generation, asked: Ask, **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        prepared(generation, asked, **options)
    assert caught.value.status == 400
    return caught.value


def test_the_prompt_is_the_one_of_training(generation: Generation) -> None:
    image = picture(0)
    turns = [("user", f"{IMAGE_MARK}{QUESTIONS[0]}"), ("assistant", "the answer to find")]
    expected = generation.encoder.encode_prompt(sample(turns, [image]), [image])
    job = prepared(generation, ask())
    np.testing.assert_array_equal(job.prompt.input_ids, expected.input_ids)
    np.testing.assert_array_equal(job.prompt.pixel_values, expected.pixel_values)
    assert job.claim is None and job.max_tokens == 16


def test_earlier_turns_are_part_of_the_prompt(generation: Generation) -> None:
    turns = (Turn("system", "Be short."), Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"))
    job = prepared(generation, Ask(turns))
    said = generation.encoder.tokenizer.decode(job.prompt.input_ids)
    assert [said.find(word) for word in ("Be short.", "one", "two", "three")] == sorted(
        said.find(word) for word in ("Be short.", "one", "two", "three")
    )
    assert "two" in said and said.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_claim_is_put_as_in_training(generation: Generation, question: str) -> None:
    image = picture(0)
    language = "zh" if "肺" in question else "en"
    turns = [("user", f"{IMAGE_MARK}{question}"), ("assistant", "x")]
    expected = generation.encoder.encode_claim(sample(turns, [image], language=language), [image], "yes")
    given = prepared(generation, ask(question, match=True, claim="yes")).claim("whatever is generated")
    own = prepared(generation, ask(question, match=True)).claim("yes")
    np.testing.assert_array_equal(given.input_ids, expected.input_ids)
    np.testing.assert_array_equal(own.input_ids, expected.input_ids)


@pytest.mark.parametrize("answer", ["", "<|vision_start|>", "see <image>", "<|box:0|>", "a<|im_end|>"])
def test_an_answer_that_cannot_be_claimed_is_not_judged(generation: Generation, answer: str) -> None:
    assert prepared(generation, ask(match=True)).claim(answer) is None


def test_a_whole_answer_with_its_heads(generation: Generation) -> None:
    image = picture(0)
    prompt = prepared(generation, ask()).prompt
    (alone,) = generate(generation.model, generation.encoder, [prompt], 5)
    claim = generation.encoder.encode_claim(
        sample([("user", f"{IMAGE_MARK}{QUESTIONS[0]}"), ("assistant", "")], [image]), [image], "no"
    )
    assert generation.heads is not None
    fit = generation.heads.match(pooled(generation.model, generation.encoder, [claim])).sigmoid().item()

    async def run() -> None:
        async with planes(generation) as plane:
            assert plane.heads == ["region", "match"]
            answer = await plane.answer(ask(max_tokens=5, region=True, match=True, claim="no"))
            assert answer.text == alone.text and answer.completion_tokens == alone.tokens
            assert answer.prompt_tokens == prompt.length
            assert answer.match == pytest.approx(fit, abs=1e-4) and answer.region is not None
            plain = await plane.answer(ask(max_tokens=5))
            assert plain.region is None and plain.match is None and plain.tokens == ()
            blind = await plane.answer(ask(images=0, max_tokens=5, region=True, match=True))
            assert blind.region is None and blind.match is None

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_stream_begins_with_the_prompts_length_and_ends_once(generation: Generation) -> None:
    async def run() -> None:
        async with planes(generation) as plane:
            async with aclosing(plane.stream(ask(max_tokens=6))) as stream:
                told = [event async for event in stream]
            assert isinstance(told[0], Begun) and isinstance(told[-1], Done)
            assert all(isinstance(event, Piece) for event in told[1:-1])

    asyncio.run(asyncio.wait_for(run(), 60))


def test_time_that_is_too_short_is_told(generation: Generation) -> None:
    async def run() -> None:
        async with planes(generation, timeout=1e-6) as plane:
            with pytest.raises(Refusal) as caught:
                await plane.answer(ask(), 100.0)  # the server's own limit holds
            assert caught.value.status == 504

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_head_that_is_not_there_is_refused(generation: Generation) -> None:
    assert generation.heads is not None
    generation.heads.match_head = None
    assert refused(generation, ask(match=True)).param == "medforge.match"
    generation.heads = None
    assert refused(generation, ask(region=True)).param == "medforge.region"


def test_what_does_not_fit_into_the_model_is_refused(generation: Generation) -> None:
    long = refused(generation, ask("word " * 5000))
    assert long.code == "context-length" and "4096" in long.message and long.param == "messages"
    many = refused(generation, ask(max_tokens=17), max_new_tokens=16)
    assert many.code == "max-tokens" and "16" in many.message
    room = generation.model.config.get_text_config().max_position_embeddings
    job = prepared(generation, ask(), max_new_tokens=10_000)
    assert job.max_tokens == room - job.prompt.length  # what fits, where no number is asked for


def grey16() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(stream, "PNG")
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image-unreadable"),
        (b"not an image", "image-unreadable"),
        (file()[:200], "image-unreadable"),
        (file(kind="JPEG")[:300], "image-unreadable"),
        (file(kind="GIF"), "image-unreadable"),
        (file(kind="TIFF"), "image-unreadable"),
        (bomb(20_000, 20_000), "image-too-large"),
        (bomb(9_000, 8_000), "image-too-large"),  # below Pillow's limit
        (bomb(100, 100), "image-unreadable"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(data: bytes, code: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_image(data, "images.3")
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, "images.3")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a chest"
    stream = io.BytesIO()
    picture(0, 24, 16).convert(data.draw(st.sampled_from(("RGB", "L", "P")))).convert("RGB").save(
        stream, data.draw(st.sampled_from(("PNG", "JPEG"))), exif=exif
    )
    damaged = bytearray(stream.getvalue())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), max_size=6)
    ):
        damaged[place] = value
    try:
        image = read_image(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]), "i")
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        assert image.mode == "RGB"


def test_what_nobody_thought_of_is_told_without_its_words(
    generation: Generation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("Jane Doe")

    monkeypatch.setattr(generation.encoder, "see", fail)

    async def run() -> None:
        async with planes(generation) as plane:
            with pytest.raises(Refusal) as caught:
                await plane.answer(ask())
            assert caught.value.status == 500 and "Jane" not in caught.value.message
            assert metric(plane.engine, "failures_total", reason="internal") == 1

    asyncio.run(run())
    assert "KeyError at" in caplog.text and "Jane" not in caplog.text


def test_the_limit_of_pixels_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 6000)
    assert read_image(file(width=100, height=60), "i").size == (100, 60)
    with pytest.raises(Refusal, match="more than 6000"):
        read_image(file(width=100, height=61), "i")


def test_files_are_read_as_in_training() -> None:
    assert read_image(file(kind="JPEG"), "i").mode == "RGB"
    assert np.asarray(read_image(grey16(), "i")).max() == 255  # scaled, not cut off
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    picture(0, 40, 20).save(turned, "JPEG", exif=exif)
    assert read_image(turned.getvalue(), "i").size == (20, 40)


def test_an_image_that_is_too_long_is_refused(generation: Generation) -> None:
    thin = Ask((Turn("user", f"{IMAGE_MARK}what"),), (file(width=3000, height=2),))
    assert refused(generation, thin).code == "image-shape"


def test_a_tiny_image_is_enlarged(generation: Generation) -> None:
    dot = Ask((Turn("user", f"{IMAGE_MARK}what"),), (file(width=1, height=1),))
    assert prepared(generation, dot).prompt.image_tokens >= 1


@pytest.mark.parametrize("mark", [*CONTROL, IMAGE_MARK, "<|box:0|>", "<|box:17|>"])
def test_text_cannot_forge_turns_images_or_boxes(mark: str) -> None:
    assert forged(f"a {mark} b") == mark
    with pytest.raises(Refusal) as caught:
        check_text(f"Name: Doe {mark}", "messages.0.content")
    assert mark in caught.value.message and "Doe" not in caught.value.message
    assert caught.value.param == "messages.0.content"


def test_plain_text_passes() -> None:
    for text in ("a < b > c", "<img>", "|im_end|", "<|box_start|>(1,2),(3,4)<|box_end|>", ""):
        assert forged(text) is None


def test_the_plane_says_what_the_model_can_take(generation: Generation) -> None:
    async def run() -> Plane:
        async with planes(generation) as plane:
            return plane

    assert asyncio.run(run()).context == 4096
