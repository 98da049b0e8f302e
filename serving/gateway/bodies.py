"""JSON bodies that a route reads by itself, once it knows who calls, and what OpenAPI is told of them."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serving.gateway import api
from serving.gateway.errors import GatewayError
from serving.gateway.reading import invalid

T = TypeVar("T", bound=BaseModel)
_TOLD = {
    404: "There is no such thing, or it is not yours.",
    409: "The first request with this key is still at work.",
}


def parse(model: type[T], body: bytes) -> T:
    """`body` as a document of the API. GatewayError 422 names the field at fault, and repeats nothing of it."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def refuse_nul(document: BaseModel, *names: str) -> None:
    """GatewayError 422 if one of the texts holds the character NUL, which PostgreSQL cannot keep."""
    for name in names:
        if "\0" in (getattr(document, name) or ""):
            raise GatewayError(422, "invalid", f"{name}: holds the character NUL; leave it out", name)


def json_body(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's description of a route's body, with the schema of `model` written out."""
    schema = model.model_json_schema()
    named = schema.pop("$defs", {})

    def written_out(node: Any) -> Any:
        if isinstance(node, list):
            return [written_out(child) for child in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return written_out(named[node["$ref"].rpartition("/")[2]])
        return {name: written_out(child) for name, child in node.items()}

    return {"required": True, "content": {"application/json": {"schema": written_out(schema), "example": example}}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the errors that not every route has."""
    return {status: {"model": api.ErrorResponse, "description": _TOLD[status]} for status in statuses}
