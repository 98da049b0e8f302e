"""KServe's V1 and V2 documents, read and written."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from kserve import InferInput, InferRequest

from serving.predictor.errors import Refusal
from serving.predictor.generation import Generation, Sampling
from serving.predictor.kserving import ReleaseModel
from tests.unit.predictor.examples import QUESTIONS, ask, data_uri, file, planes

Test = Callable[[ReleaseModel], Awaitable[None]]


def run(generation: Generation, test: Test, **options: Any) -> None:
    async def whole() -> None:
        async with planes(generation, **options) as plane:
            await test(ReleaseModel("medforge", "abc", plane))

    asyncio.run(asyncio.wait_for(whole(), 60))


def instance(seed: int = 0, question: str = QUESTIONS[0]) -> dict[str, str]:
    return {"image": base64.b64encode(file(seed)).decode(), "question": question}


def request(images: list[Any], questions: list[Any], **names: str) -> InferRequest:
    columns = ((names.get("image", "image"), images), ("question", questions))
    return InferRequest("medforge", [InferInput(name, [len(data)], "BYTES", data) for name, data in columns])


def test_v1_answers_each_instance(generation: Generation) -> None:
    async def test(model: ReleaseModel) -> None:
        asked = [instance(0), instance(1, QUESTIONS[1]), {"image": data_uri(0), "question": QUESTIONS[0]}]
        told = (await model.predict({"instances": asked}))["predictions"]
        alone = await model._plane.answer(ask(sampling=Sampling(top_logprobs=0), region=True, match=True))
        mean = sum(token.logprob for token in alone.tokens) / len(alone.tokens)
        assert told[0]["answer"] == told[2]["answer"] == alone.text
        assert told[0]["confidence"] == pytest.approx(math.exp(mean), rel=1e-3)
        assert told[0]["region"] == pytest.approx(alone.region, abs=1e-4)
        assert told[0]["match"] == (None if alone.match is None else pytest.approx(alone.match, abs=1e-4))
        assert set(told[1]) == {"answer", "confidence", "region", "match"}

    run(generation, test)


def test_v2_answers_as_v1_does(generation: Generation) -> None:
    async def test(model: ReleaseModel) -> None:
        first = (await model.predict({"instances": [instance(0), instance(1)]}))["predictions"]
        images = [instance(0)["image"], instance(1)["image"].encode()]  # as JSON gives it, and as bytes
        response: Any = await model.predict(request(images, [QUESTIONS[0]] * 2))
        columns = {output.name: output for output in response.outputs}
        assert [output.datatype for output in response.outputs] == ["BYTES", "FP32", "FP32", "FP32"]
        assert columns["answer"].data == [row["answer"] for row in first]
        assert columns["region"].shape == [2, 4]
        np.testing.assert_allclose(columns["region"].as_numpy(), [row["region"] for row in first], atol=1e-4)
        for name in ("confidence", "match"):
            expected = [math.nan if row[name] is None else row[name] for row in first]
            np.testing.assert_allclose(columns[name].as_numpy(), expected, atol=1e-4)
        assert response.model_version == "abc"
        assert [o["name"] for o in model.get_output_types()] == [output.name for output in response.outputs]
        assert [i["name"] for i in model.get_input_types()] == ["image", "question"]

    run(generation, test)


def test_a_release_without_heads_has_no_columns_for_them(generation: Generation) -> None:
    generation.heads = None

    async def test(model: ReleaseModel) -> None:
        response: Any = await model.predict(request([instance()["image"]], ["what?"]))
        assert [output.name for output in response.outputs] == ["answer", "confidence"]
        assert len(model.get_output_types()) == 2
        assert (await model.predict({"instances": [instance()]}))["predictions"][0]["region"] is None

    run(generation, test)


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ({}, "instances"),
        ([], "instances"),
        ({"instances": "x"}, "instances"),
        ({"instances": []}, "instances"),
        ({"instances": [instance()] * 5}, "instances"),
        ({"instances": ["x"]}, "instances.0"),
        ({"instances": [instance(), {"image": "x"}]}, "instances.1"),
        ({"instances": [instance() | {"Jane": "Doe"}]}, "instances.0"),
        ({"instances": [{"image": None, "question": "x"}]}, "instances.0"),
        ({"instances": [{"image": "!!", "question": "x"}]}, "instances.0.image"),
        ({"instances": [instance(question="<image>")]}, "instances.0.question"),
        ({"instances": [instance(question=" ")]}, "instances.0"),
    ],
)
def test_v1_names_what_is_wrong(generation: Generation, payload: Any, param: str) -> None:
    async def test(model: ReleaseModel) -> None:
        with pytest.raises(Refusal) as caught:
            await model.predict(payload)
        assert (caught.value.status, caught.value.param) == (400, param)
        assert "Jane" not in caught.value.message

    run(generation, test, max_batch=2, queue=2)


@pytest.mark.parametrize(
    ("images", "questions", "names"),
    [
        ([], [], {}),
        ([instance()["image"]], ["a", "b"], {}),
        ([instance()["image"]], ["a"], {"image": "picture"}),
        ([b"\xff\xd8"], ["a"], {}),
        ([""], ["a"], {}),
    ],
)
def test_v2_names_what_is_wrong(generation: Generation, images: Any, questions: Any, names: dict[str, str]) -> None:
    async def test(model: ReleaseModel) -> None:
        with pytest.raises(Refusal) as caught:
            await model.predict(request(images, questions, **names))
        assert caught.value.status == 400 and "inputs" in caught.value.message

    run(generation, test)


def test_one_refusal_ends_the_others(generation: Generation) -> None:
    async def test(model: ReleaseModel) -> None:
        broken = {"image": base64.b64encode(b"no image").decode(), "question": "what?"}
        with pytest.raises(Refusal, match="no PNG or JPEG"):
            await model.predict({"instances": [instance(), broken, instance()]})
        assert model._engine._inside == 0
        assert (await model.predict({"instances": [instance()]}))["predictions"]

    run(generation, test)


def test_time_and_health(generation: Generation) -> None:
    async def test(model: ReleaseModel) -> None:
        assert await model.healthy()
        with pytest.raises(Refusal) as caught:
            await model.predict({"instances": [instance()]}, {"x-request-timeout": "1e-6"})
        assert caught.value.status == 504
        model.stop_engine()
        assert not await model.healthy()

    run(generation, test)
