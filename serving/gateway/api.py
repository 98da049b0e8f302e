"""The public API's documents: what /v1/diagnose, /v1/jobs, /v1/feedback and /v1/releases take and give."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

DISCLAIMER = "Not for diagnostic use without review by a qualified person."

Task = Literal["ask", "report", "finding", "locate"]
Language = Literal["en", "zh"]
Share = Annotated[float, Field(ge=0, le=1)]
Reason = Literal["no-region", "low-match", "low-confidence", "model-refused", "undecided", "unreadable"]

REASONS: dict[Reason, dict[Language, str]] = {
    "no-region": {"en": "No region of the image could be found for this.", "zh": "未能在图像中找到对应区域。"},
    "low-match": {
        "en": "The region and the answer do not fit each other well enough.",
        "zh": "所定位的区域与回答不够吻合。",
    },
    "low-confidence": {"en": "The model is not sure enough of its answer.", "zh": "模型对其回答的把握不足。"},
    "model-refused": {"en": "The model says that it cannot answer this.", "zh": "模型表示无法回答该问题。"},
    "undecided": {"en": "The finding can be neither affirmed nor denied.", "zh": "无法确定该征象是否存在。"},
    "unreadable": {"en": "The model's answer could not be understood.", "zh": "无法解读模型的回答。"},
}


class Document(BaseModel):
    """A JSON document of the API: unknown fields are errors, so that a misspelt one is not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageIn(Document):
    """An image in a JSON request."""

    data: str = Field(description="The file (PNG, JPEG, TIFF or DICOM) in base64, or as a data: URI.", repr=False)
    frame: int | None = Field(None, ge=0, description="Frame of a multi-frame file, from 0; none: the middle one.")


class Question(Document):
    """What is asked about the images. `ask` needs a question; `finding` and `locate` need a finding."""

    task: Task = Field("ask", description="ask a question, write a report, affirm or deny a finding, or locate one.")
    question: str | None = Field(None, min_length=1, max_length=4000)
    finding: str | None = Field(
        None, min_length=1, max_length=400, description="Such as `pleural effusion`; an article before it is fine."
    )
    language: Language = "en"

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        wanted = {"ask": "question", "finding": "finding", "locate": "finding"}.get(self.task)
        for name in ("question", "finding"):
            given = getattr(self, name)
            if name == wanted and (given is None or not given.strip()):
                raise ValueError(f"{name}: the task {self.task!r} needs it")
            if name != wanted and given is not None:
                raise ValueError(f"{name}: the task {self.task!r} does not take it")
        return self


class DiagnoseRequest(Question):
    """The JSON body of POST /v1/diagnose."""

    images: list[ImageIn] = Field(min_length=1, description="The images of one study.")


class Release(Document):
    """The release that answered."""

    digest: str | None = Field(description="SHA-256 of the release's manifest; null where the upstream tells none.")
    model: str = Field(description="The name that the upstream serves it under.")
    version: str | None = Field(None, description="The release's own name and code version.")
    track: Literal["stable", "candidate"] = "stable"


class Region(Document):
    """A box on an image."""

    label: str
    image: int = Field(ge=0, description="Number of the image, from 0.")
    box: tuple[Share, Share, Share, Share] = Field(description="x1, y1, x2, y2 as shares of width and height.")
    pixels: tuple[int, int, int, int] = Field(description="The same in pixels of the image as it was sent.")
    source: Literal["head", "text", "reader"] = Field(
        description="The region head's box, one that the answer names, or one that a reader drew (feedback)."
    )


class Score(Document):
    """A score, what it has to reach, and where it comes from."""

    value: Share
    threshold: Share
    source: Literal["head", "question", "tokens"] = Field(
        description="match head; asked back (probability of yes); mean probability of the answer's tokens (geometric)."
    )


class Finding(Document):
    """A finding affirmed or denied."""

    name: str
    present: bool
    probability: Share | None = Field(None, description="Of yes against no, where the upstream gives probabilities.")


class ImageOut(Document):
    """What was made of an image."""

    sha256: str = Field(description="Of the file as it was sent.")
    format: Literal["png", "jpeg", "tiff", "dicom"]
    width: int
    height: int
    frame: int | None = None
    frames: int = 1


class Usage(Document):
    """Tokens, images' included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class DiagnoseResponse(Document):
    """The answer, or why there is none. `answer`, `finding` are null where the decision is `abstained`."""

    id: str = Field(description="The request's id, as in the header x-request-id.")
    created: datetime
    task: Task
    decision: Literal["answered", "abstained"]
    reason: Reason | None = None
    reason_text: str | None = None
    answer: str | None = None
    finding: Finding | None = None
    regions: list[Region] = []
    match: Score | None = None
    confidence: Score | None = None
    release: Release
    images: list[ImageOut]
    usage: Usage = Usage()
    disclaimer: str = DISCLAIMER


class ErrorBody(Document):
    """What went wrong."""

    code: str
    type: str
    message: str
    param: str | None = None
    request_id: str | None = None


class ErrorResponse(Document):
    """Every error of the gateway."""

    error: ErrorBody


class JobRequest(Document):
    """The JSON body of POST /v1/jobs."""

    items: list[DiagnoseRequest] = Field(min_length=1)
    name: str | None = Field(None, max_length=200, description="The caller's own name of the job; no patient's data.")


class JobStatus(Document):
    """A job: how far it is."""

    id: str
    name: str | None = None
    status: Literal["waiting", "running", "finished", "cancelled"]
    created: datetime
    finished: datetime | None = None
    expires: datetime | None = Field(None, description="When its results are removed.")
    items: int
    done: int
    failed: int


class JobItem(Document):
    """The outcome of one item: a result or an error."""

    index: int
    result: DiagnoseResponse | None = None
    error: ErrorBody | None = None


class JobResults(Document):
    """A page of a job's outcomes, in the items' order; `next` is the `after` of the page that follows."""

    id: str
    items: list[JobItem]
    next: int | None = None


class FeedbackRequest(Document):
    """A reader's verdict on an answer."""

    request_id: str = Field(min_length=1, max_length=100)
    verdict: Literal["correct", "partly", "wrong", "unsafe"]
    correction: str | None = Field(None, max_length=8000, description="The right answer; no patient's data.")
    regions: list[Region] = Field([], max_length=20, description="The right boxes.")
    comment: str | None = Field(None, max_length=4000)


class FeedbackResponse(Document):
    """Where the verdict is kept."""

    id: str
    request_id: str
    status: Literal["kept"] = "kept"


class CurrentRelease(Document):
    """What is served now."""

    stable: Release
    candidate: Release | None = None
    candidate_weight: Share = 0.0
    heads: list[str] = []
    about: dict[str, Any] = Field({}, description="Data set, base model, policy: as the release's manifest tells.")
    disclaimer: str = DISCLAIMER
