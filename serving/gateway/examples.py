"""What OpenAPI tells of /v1/diagnose: both kinds of body, and answers."""

from __future__ import annotations

from typing import Any

from serving.gateway import api

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
_REQUESTS = {
    "question": {"value": {"task": "ask", "question": "Which organ is shown?", "images": [{"data": _PIXEL}]}},
    "finding": {"value": {"task": "finding", "finding": "a pleural effusion", "images": [{"data": _PIXEL}]}},
    "place": {"value": {"task": "locate", "finding": "lesion", "images": [{"data": _PIXEL, "frame": 0}]}},
    "report in Chinese": {"value": {"task": "report", "language": "zh", "images": [{"data": _PIXEL}]}},
}
_ANSWERED: dict[str, Any] = {
    "id": "4f1c0e9ab0c14d6e9a3f6c1d2e5b7a80",
    "created": "2026-05-01T08:30:00Z",
    "task": "finding",
    "decision": "answered",
    "reason": None,
    "reason_text": None,
    "answer": "yes",
    "finding": {"name": "a pleural effusion", "present": True, "probability": 0.94},
    "regions": [
        {
            "label": "a pleural effusion",
            "image": 0,
            "box": [0.1, 0.55, 0.4, 0.9],
            "pixels": [51, 282, 205, 461],
            "source": "head",
        }
    ],
    "match": {"value": 0.91, "threshold": 0.5, "source": "head"},
    "confidence": {"value": 0.88, "threshold": 0.0, "source": "tokens"},
    "release": {"digest": "9f" * 32, "model": "medforge", "version": "chest 0.1.0", "track": "stable"},
    "images": [{"sha256": "5e" * 32, "format": "dicom", "width": 512, "height": 512, "frame": 0, "frames": 1}],
    "usage": {"prompt_tokens": 310, "completion_tokens": 2, "total_tokens": 312},
    "disclaimer": api.DISCLAIMER,
}
_ABSTAINED = _ANSWERED | {
    "decision": "abstained",
    "reason": "low-match",
    "reason_text": api.REASONS["low-match"]["en"],
    "answer": None,
    "finding": None,
    "match": {"value": 0.31, "threshold": 0.5, "source": "head"},
}
_EVENTS = (
    'event: status\ndata: {"stage": "waiting"}\n\n'
    'event: delta\ndata: {"text": "yes", "provisional": true}\n\n'
    'event: result\ndata: {"id": "4f1c0e9ab0c14d6e9a3f6c1d2e5b7a80", "decision": "answered", "answer": "yes"}\n\n'
)

IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 200},
    "description": "Makes it safe to send the request again when its answer was lost: the same answer comes back.",
}

_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or why it is withheld.",
        "headers": {
            name: {"schema": {"type": "string"}, "description": text}
            for name, text in (
                ("x-request-id", "The request's id, for feedback and support."),
                ("x-medforge-release", "SHA-256 of the release that answered (not with event streams)."),
                ("x-medforge-track", "stable or candidate (not with event streams)."),
                ("x-medforge-notice", api.DISCLAIMER),
            )
        },
        "content": {
            "application/json": {
                "examples": {"answered": {"value": _ANSWERED}, "abstained": {"value": _ABSTAINED}},
            },
            "text/event-stream": {"schema": {"type": "string"}, "example": _EVENTS},
        },
    },
    400: {
        "description": "An image or a text is not taken: image-format, image-unreadable, image-frame, image-elongated, "
        "image-base64, image-missing, images-too-many, burned-in-annotation, dicom-unreadable, dicom-no-image, "
        "dicom-transfer-syntax, dicom-unsupported, control-token, multipart-invalid, idempotency-key.",
        "content": _ERROR,
    },
    408: {"description": "The body did not come in time: body-too-slow.", "content": _ERROR},
    409: {"description": "The same Idempotency-Key is at work: idempotency-key-in-use.", "content": _ERROR},
    413: {"description": "body-too-large or image-too-large.", "content": _ERROR},
    415: {"description": "The body is neither JSON nor a form: content-type.", "content": _ERROR},
    422: {
        "description": "A field is missing or wrong: invalid, json-invalid, idempotency-key-reused.",
        "content": _ERROR,
    },
}


def request_body() -> dict[str, Any]:
    """The request's body as JSON and as a form."""
    schema = api.DiagnoseRequest.model_json_schema()
    # references inside a document's own schema would be looked up in the whole document
    schema["properties"]["images"]["items"] = schema.pop("$defs")["ImageIn"]
    fields = api.Question.model_json_schema()["properties"]
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {
            **fields,
            "image": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "string", "format": "binary"},
                "description": "PNG, JPEG, TIFF or DICOM files.",
            },
            "frame": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "description": "Frame of a multi-frame file: one for all images, or one for each.",
            },
        },
        "additionalProperties": False,
    }
    example = {"task": "finding", "finding": "a pleural effusion", "image": ["(the bytes of chest.dcm)"]}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": schema, "examples": _REQUESTS},
            "multipart/form-data": {"schema": form, "example": example},
        },
    }
