"""The request of OpenAI's chat API as this server takes it, and what it makes of one.

Fields that are not known are let pass, as clients send some; one that would change the answer and is not supported is
an error, never ignored.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medforge.records import IMAGE_MARK, Turn
from serving.predictor.errors import bad_request
from serving.predictor.generation import Sampling
from serving.predictor.plane import Ask, check_text

# what would change the answer, and the values that ask for nothing
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "top_k": (-1, 0),
    "min_p": (0,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "best_of": (1,),
    "echo": (False,),
}


class _ImageUrl(BaseModel):
    url: str = Field(repr=False)


class _Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | None = None


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Extension(BaseModel):
    """What the task heads are asked. Unknown fields are errors here: the extension is this server's own."""

    model_config = ConfigDict(extra="forbid")

    region: bool = False
    match: bool = False
    claim: str | None = None


_Stop = Annotated[str, Field(min_length=1, max_length=200)]


class ChatRequest(BaseModel):
    """The body of POST /chat/completions."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: _Stop | list[_Stop] | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    medforge: _Extension | None = None


def read_request(body: bytes) -> ChatRequest:
    """The request in a body. Refusal 400 names the field that is wrong, and never repeats its value."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        # of a union's branches the one that came farthest is meant
        told = error.errors(include_input=False, include_url=False, include_context=False)
        first = max(told, key=lambda each: len(each["loc"]))
        # pydantic names the branch of a union too ("str", "list[…]"): those are no fields
        fields = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
        param = ".".join(part for part in fields if part != "str") or None
        raise bad_request("invalid-request", f"{param or 'the body'}: {first['msg']}", param) from None
    for name, value in (request.model_extra or {}).items():
        if name in _UNSUPPORTED and value is not None and value not in _UNSUPPORTED[name]:
            raise bad_request("unsupported", f"{name}: is not supported by this server; leave it out", name)
    if request.n not in (None, 1):
        raise bad_request("unsupported", "n: one answer is given to a request; send the request again for more", "n")
    if isinstance(request.stop, list) and len(request.stop) > 4:
        raise bad_request("invalid-request", "stop: at most 4 strings are taken", "stop")
    if request.top_logprobs and not request.logprobs:
        raise bad_request("invalid-request", "top_logprobs: needs logprobs true beside it", "top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise bad_request("invalid-request", "stream_options: needs stream true beside it", "stream_options")
    return request


def make_ask(request: ChatRequest) -> Ask:
    """What the request asks. Temperature is 0 unless it is given: answers that can be had again. Refusal 400."""
    images: list[bytes] = []
    turns = [_turn(message, f"messages.{number}", images) for number, message in enumerate(request.messages)]
    if turns[-1].role != "user":
        raise bad_request("invalid-request", "messages: the last one has to be the user's", "messages")
    if not any(turn.text.strip() for turn in turns if turn.role == "user"):
        raise bad_request("invalid-request", "messages: nothing is asked", "messages")
    extension = request.medforge or _Extension()
    if extension.claim is not None:
        if not extension.match:
            raise bad_request("invalid-request", "medforge.claim: needs match true beside it", "medforge.claim")
        if not extension.claim.strip():
            raise bad_request("invalid-request", "medforge.claim: is blank; leave it out, or claim something",
                              "medforge.claim")  # fmt: skip
        check_text(extension.claim, "medforge.claim")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    sampling = Sampling(
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=None if request.seed is None else request.seed % (1 << 63),
        stop=stop,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    return Ask(
        turns=tuple(turns),
        images=tuple(images),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        sampling=sampling,
        region=extension.region,
        match=extension.match,
        claim=extension.claim,
    )


def _turn(message: _Message, param: str, images: list[bytes]) -> Turn:
    """The message as a turn; its images are added to `images`."""
    role = "system" if message.role == "developer" else message.role
    content = message.content or ""
    parts = content if isinstance(content, list) else [_Part(type="text", text=content)]
    texts = [""]  # between the images; parts of text that follow each other are one, or marks could be made of two
    for number, part in enumerate(parts):
        where = f"{param}.content.{number}"
        if part.type == "text":
            if part.text is None:
                raise bad_request("invalid-request", f"{where}: a part of type text needs a text", where)
            texts[-1] += part.text
        elif part.image_url is None or role != "user":
            message_text = "a part of type image_url needs an image_url, in a message of the user's"
            raise bad_request("invalid-request", f"{where}: {message_text}", where)
        else:
            images.append(decode_data(part.image_url.url, f"{where}.image_url.url", plain=False))
            texts.append("")
    for text in texts:
        check_text(text, f"{param}.content")
    return Turn(role, IMAGE_MARK.join(texts))


def decode_data(text: str, param: str, plain: bool = True) -> bytes:
    """The bytes of a data: URI of a PNG or JPEG, or, where `plain`, of bare base64. Refusal 400 names `param`."""
    head, comma, data = text[:100].partition(",")
    if head.startswith("data:"):
        if not comma or not head.endswith(";base64"):
            raise bad_request("image-unreadable", f"{param}: a data: URI has to be data:image/png;base64,…", param)
        if head[5:].split(";")[0].lower() not in ("image/png", "image/jpeg", "image/jpg"):
            raise bad_request("image-type", f"{param}: only image/png and image/jpeg are taken", param)
        data = text[len(head) + 1 :]
    elif plain:
        data = text
    else:
        raise bad_request("image-address", f"{param}: only data: URIs are taken; send the image itself", param)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("image-unreadable", f"{param}: is not valid base64", param) from None
