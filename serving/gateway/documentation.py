"""OpenAPI's description of the gateway: every route, the errors that each may give, who may call, the chat by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serving.gateway import api, chat

DESCRIPTION = (
    "Asks a medical vision-language model about images, with the region it looked at and how sure it is. "
    + api.DISCLAIMER
)
_OPEN = ("/livez", "/readyz", "/metrics", "/")  # without a key
_ERRORS = {
    "400": "The request is at fault; `param` names the field.",
    "401": "No valid key or token.",
    "403": "The key or token lacks the scope.",
    "413": "The body or an image is too large.",
    "421": "The host name is not served here.",
    "422": "A field is missing or wrong; `param` names it.",
    "429": "Too many requests of this client; Retry-After says when to go on.",
    "500": "The gateway failed.",
    "502": "The model's server failed.",
    "503": "Too busy, draining, or the model's server is away; Retry-After says when to try again.",
    "504": "There was no answer in time.",
}
_EXAMPLE = {
    "error": {
        "code": "rate-exceeded",
        "type": "invalid_request_error",
        "message": "More than 120 requests in 60 seconds",
        "param": None,
        "request_id": "4f1c0e9ab0c14d6e9a3f6c1d2e5b7a80",
    }
}
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
_CHAT_REQUEST = {
    "model": "medforge",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": _PIXEL}},
                {"type": "text", "text": "Is there a pleural effusion in this image? Answer yes or no."},
            ],
        }
    ],
    "max_tokens": 64,
}
_CHAT_ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1760000000,
    "model": "medforge",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "no"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 310, "completion_tokens": 2, "total_tokens": 312},
}
_CHAT = {
    "post": {
        "tags": ["OpenAI"],
        "operationId": "chat",
        "summary": "A chat completion, as OpenAI's API has it",
        "description": "Scope `chat`. Images are data: URIs of PNG or JPEG. With `stream`, server-sent events.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["messages"],
                        "properties": {
                            "model": {"type": ["string", "null"]},
                            "messages": {
                                "type": "array",
                                "minItems": 1,
                                "items": {"$ref": "#/components/schemas/ChatMessage"},
                            },
                            "stream": {"type": ["boolean", "null"], "default": False},
                        },
                        "additionalProperties": True,
                    },
                    "example": _CHAT_REQUEST,
                }
            },
        },
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": {
                    name: {"schema": {"type": "string"}, "description": text}
                    for name, text in (
                        ("x-request-id", "The request's id, for feedback and support."),
                        ("x-medforge-release", "SHA-256 of the release that answered."),
                        ("x-medforge-track", "stable or candidate."),
                        ("x-medforge-notice", chat.NOTICE),
                    )
                },
                "content": {
                    "application/json": {"schema": {"type": "object"}, "example": _CHAT_ANSWER},
                    "text/event-stream": {},
                },
            }
        },
    }
}
_SCHEMAS: dict[str, Any] = {
    "ChatMessage": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string"},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"$ref": "#/components/schemas/ChatPart"}},
                    {"type": "null"},
                ]
            },
        },
    },
    "ChatPart": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["text", "image_url"]},
            "text": {"type": ["string", "null"]},
            "image_url": {
                "type": ["object", "null"],  # some clients send a part's other fields as null
                "required": ["url"],
                "properties": {"url": {"type": "string", "format": "uri"}},
            },
        },
    },
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once: `app.openapi` calls it."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
        made["paths"][chat.PATH] = _CHAT
        components = made.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas |= _SCHEMAS | _error_schemas()
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which the gateway never sends
            schemas.pop(unused, None)
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "An API key (mf_…) or an OIDC token."}
        }
        for path, operations in made["paths"].items():
            for operation in operations.values():
                _add_errors(operation, open_to_all=path in _OPEN)
        app.openapi_schema = made
    return app.openapi_schema


def methods(app: FastAPI, path: str) -> str:
    """The methods that are served at a route's template, as the header Allow lists them; "" if it is none."""
    return ", ".join(sorted(method.upper() for method in describe(app)["paths"].get(path, ())))


def _error_schemas() -> dict[str, Any]:
    schema = api.ErrorResponse.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = schema.pop("$defs")
    return {"ErrorResponse": schema, **inner}


def _add_errors(operation: dict[str, Any], open_to_all: bool) -> None:
    """What every route may answer, and that it needs a key."""
    responses = operation.setdefault("responses", {})
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    if open_to_all:
        return
    operation["security"] = [{"key": []}]
    body = {"schema": {"$ref": "#/components/schemas/ErrorResponse"}, "example": _EXAMPLE}
    for status, text in _ERRORS.items():
        responses.setdefault(status, {"description": text, "content": {"application/json": body}})
