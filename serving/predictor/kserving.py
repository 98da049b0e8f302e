"""The release as a model of KServe: its V1 and V2 protocols.

V1  {"instances": [{"image": base64 or data: URI, "question": "…"}]}
    → {"predictions": [{"answer", "confidence", "region", "match"}]}
V2  inputs image BYTES [n] (base64 or data: URI) and question BYTES [n]
    → outputs answer BYTES [n], confidence FP32 [n], and region FP32 [n, 4], match FP32 [n] where the release has heads

`confidence` is the geometric mean of the answer's tokens' probabilities. What is not known is null in V1, NaN in V2.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InferenceError
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane

from medforge.records import IMAGE_MARK, Turn
from serving.predictor.documents import decode_data
from serving.predictor.engine import Engine
from serving.predictor.errors import bad_request
from serving.predictor.generation import Sampling
from serving.predictor.openai import TIMEOUT_HEADER, read_timeout
from serving.predictor.plane import Answer, Ask, Plane, check_text


class ReleaseDataPlane(DataPlane):
    """KServe's way from a request to a model, where its own does not say what is the matter."""

    def __init__(self, models: ModelRepository, model: ReleaseModel) -> None:
        super().__init__(models)
        self._model = model

    async def ready(self) -> bool:
        """Whether the server answers: KServe's own is always true."""
        return await self._model.healthy()

    def decode_inference_request(self, body: Any, headers: Any, model_name: str) -> InferRequest:
        """A V2 request. Refusal 400 for binary data that cannot be read, which KServe would show in its error."""
        try:
            return super().decode_inference_request(body, headers, model_name)
        except (InferenceError, ValueError, KeyError, TypeError, struct.error):
            message = "the body is no V2 request: binary data has to be UTF-8 text, images in base64"
            raise bad_request("invalid-request", message, "inputs") from None


class ReleaseModel(Model):
    """One release, served by `plane`; `version` is what V2 answers name."""

    def __init__(self, name: str, version: str, plane: Plane) -> None:
        super().__init__(name)
        self._version, self._plane = version, plane
        self.ready = True
        self.engine = True  # KServe then runs `start_engine` beside its server, and calls `stop_engine` after it

    @property
    def _engine(self) -> Engine:
        return self._plane.engine

    async def healthy(self) -> bool:
        """Whether it answers requests."""
        return bool(self.ready) and self._engine.healthy

    async def start_engine(self) -> None:
        """Answer what waits, until the server has stopped."""
        await self._engine.serve()

    def stop_engine(self) -> None:
        """End `start_engine`."""
        self._engine.stop()

    def get_input_types(self) -> list[dict[str, Any]]:
        """V2's metadata of the inputs."""
        return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("image", "question")]

    def get_output_types(self) -> list[dict[str, Any]]:
        """V2's metadata of the outputs."""
        heads = {"region": [-1, 4], "match": [-1]}
        return [
            {"name": "answer", "datatype": "BYTES", "shape": [-1]},
            {"name": "confidence", "datatype": "FP32", "shape": [-1]},
            *({"name": name, "datatype": "FP32", "shape": heads[name]} for name in self._plane.heads),
        ]

    async def predict(
        self,
        payload: dict[str, Any] | InferRequest,
        headers: Mapping[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> dict[str, Any] | InferResponse:
        """The answers, in the protocol of the request. Refusal when one of them is refused: then there are none."""
        seconds = read_timeout((headers or {}).get(TIMEOUT_HEADER))
        if isinstance(payload, InferRequest):
            answers = await self._answer(self._read_v2(payload), seconds)
            return self._write_v2(payload, answers)
        return {"predictions": [_prediction(a) for a in await self._answer(self._read_v1(payload), seconds)]}

    async def _answer(self, asks: Sequence[Ask], seconds: float | None) -> list[Answer]:
        """All answers; the first refusal ends the others."""
        tasks = [asyncio.ensure_future(self._plane.answer(ask, seconds)) for ask in asks]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _ask(self, image: Any, question: Any, where: str) -> Ask:
        for name, value in (("image", image), ("question", question)):
            if not isinstance(value, str) or not value.strip():
                raise bad_request("invalid-request", f"{where}: {name} is missing or no text", where)
        check_text(question, f"{where}.question")
        data = decode_data(image, f"{where}.image")
        heads = self._plane.heads
        return Ask(
            turns=(Turn("user", f"{IMAGE_MARK}{question}"),),
            images=(data,),
            sampling=Sampling(top_logprobs=0),
            region="region" in heads,
            match="match" in heads,
        )

    def _check_count(self, count: int, where: str) -> None:
        if not 1 <= count <= self._engine.capacity:
            message = f"{where}: has {count} questions; 1 to {self._engine.capacity} can be asked in a request"
            raise bad_request("invalid-request", message, where)

    def _read_v1(self, payload: Any) -> list[Ask]:
        instances = payload.get("instances") if isinstance(payload, dict) else None
        if not isinstance(instances, list):
            raise bad_request("invalid-request", "instances: a list of {image, question} is expected", "instances")
        self._check_count(len(instances), "instances")
        asks = []
        for number, instance in enumerate(instances):
            where = f"instances.{number}"
            if not isinstance(instance, dict):
                raise bad_request("invalid-request", f"{where}: {{image, question}} is expected", where)
            if unknown := sorted(map(str, instance.keys() - {"image", "question"})):
                raise bad_request("invalid-request", f"{where}: {len(unknown)} fields are not known", where)
            asks.append(self._ask(instance.get("image"), instance.get("question"), where))
        return asks

    def _read_v2(self, request: InferRequest) -> list[Ask]:
        columns = {}
        for name in ("image", "question"):
            tensor = request.get_input_by_name(name)
            if tensor is None or tensor.datatype != "BYTES":
                raise bad_request("invalid-request", f"inputs: {name} of datatype BYTES is missing", "inputs")
            columns[name] = [_text(value, f"inputs.{name}") for value in np.ravel(np.array(tensor.data, dtype=object))]
        count = len(columns["question"])
        self._check_count(count, "inputs.question")
        if len(columns["image"]) != count:
            message = f"inputs: {len(columns['image'])} images for {count} questions; each question needs its image"
            raise bad_request("invalid-request", message, "inputs")
        pairs = zip(columns["image"], columns["question"], strict=True)
        return [self._ask(image, question, f"inputs.{number}") for number, (image, question) in enumerate(pairs)]

    def _write_v2(self, request: InferRequest, answers: Sequence[Answer]) -> InferResponse:
        texts = np.array([answer.text for answer in answers], dtype=object)
        outputs = [
            _output("answer", "BYTES", texts),
            _output("confidence", "FP32", _floats([_confidence(answer) for answer in answers])),
        ]
        if "region" in self._plane.heads:
            boxes = [answer.region or (math.nan,) * 4 for answer in answers]
            outputs.append(_output("region", "FP32", np.array(boxes, dtype=np.float32)))
        if "match" in self._plane.heads:
            outputs.append(_output("match", "FP32", _floats([answer.match for answer in answers])))
        return InferResponse(
            response_id=request.id or "",
            model_name=self.name,
            model_version=self._version,
            infer_outputs=outputs,
            use_binary_outputs=request.use_binary_outputs,
            requested_outputs=request.request_outputs,
        )


def _output(name: str, datatype: str, values: np.ndarray) -> InferOutput:
    output = InferOutput(name, list(values.shape), datatype)
    output.set_data_from_numpy(values, binary_data=False)
    return output


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float32)


def _text(value: Any, where: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise bad_request("invalid-request", f"{where}: is not UTF-8; send images in base64", where) from None


def _confidence(answer: Answer) -> float | None:
    """The geometric mean of the tokens' probabilities; None for an answer without tokens."""
    if not answer.tokens:
        return None
    return math.exp(sum(token.logprob for token in answer.tokens) / len(answer.tokens))


def _prediction(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "confidence": _confidence(answer),
        "region": None if answer.region is None else list(answer.region),
        "match": answer.match,
    }
