"""The gateway's settings: environment variables `MEDFORGE_GATEWAY_…`, or a `.env` file. An unknown one is an error."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from dotenv import dotenv_values
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from typing_extensions import Self

from serving.gateway import routing

PREFIX = "MEDFORGE_GATEWAY_"
ENV_FILE = ".env"
DEFAULT_SECRET = "change-this"  # noqa: S105  what production refuses to start with
_RATE = re.compile(r"[1-9]\d*/(second|minute|hour|day)")
_ROUTED = {"stable", "candidate", "candidate_weight", "stable_release", "candidate_release"}
Rate = str


class Settings(BaseSettings):
    """All that decides how the gateway behaves. Thresholds are shares 0–1, times are in seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=ENV_FILE, extra="ignore", frozen=True)

    environment: Literal["development", "production"] = Field(
        "development", description="Production refuses to start with default secrets or without authentication."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(Path(".medforge/gateway"), description="Database (SQLite), audit log, waiting jobs.")
    secret_key: SecretStr = Field(
        SecretStr(DEFAULT_SECRET), description="Keys API keys' hashes; 32 characters or more."
    )
    allowed_hosts: list[str] = Field(["*"], description="Host headers that are served.")
    root_path: str = Field("", description="The path that a proxy in front serves the gateway under.")

    # upstreams: base URLs of OpenAI's API, such as http://host/openai/v1
    stable: str = Field("http://127.0.0.1:8081/openai/v1", description="The approved release's predictor.")
    candidate: str = Field("", description="The candidate's predictor; empty for none.")
    candidate_weight: float = Field(0.0, ge=0, le=1, description="Share of callers who are given the candidate.")
    stable_release: str = Field("", description="Digest, where the upstream does not tell it (vLLM).")
    candidate_release: str = Field("", description="Digest, where the upstream does not tell it (vLLM).")
    routing: Path | None = Field(
        None, description="routing.json, followed while it changes, in place of the five settings above (a cluster)."
    )
    upstream_key: SecretStr = Field(SecretStr(""), description="Bearer token that upstreams want.")
    connect_timeout: float = Field(2.0, gt=0)
    deadline: float = Field(120.0, gt=0, description="The longest a request may take.")
    retries: int = Field(2, ge=0, description="Further attempts before the first byte of an answer.")
    retry_budget: float = Field(0.1, ge=0, le=1, description="Share of requests that may be attempts again.")
    breaker_failures: int = Field(5, ge=1, description="Failures in a row that open an upstream's circuit.")
    breaker_seconds: float = Field(10.0, gt=0, description="How long an open circuit stays so before a trial.")

    # admission
    concurrency: int = Field(32, ge=1, description="Requests that are with an upstream at once.")
    queue: int = Field(64, ge=0, description="Requests that may wait for a place; more are refused with 503.")
    queue_seconds: float = Field(10.0, gt=0, description="The longest wait for a place.")
    rate: Rate = Field("120/minute", description="Requests of a client, such as 10/second.")
    quota: Rate = Field("20000/day", description="Requests of a client over a long time.")
    redis: str = Field("", description="redis:// URL for limits that several gateways share; empty: in memory.")
    max_body: int = Field(64 << 20, ge=1024, description="Bytes of a request.")
    drain_seconds: float = Field(30.0, ge=0, description="How long requests in flight may take after SIGTERM.")

    # images
    max_images: int = Field(4, ge=1)
    max_image_bytes: int = Field(32 << 20, ge=1024, description="Bytes of one image as sent.")
    max_pixels: int = Field(64_000_000, ge=1, description="Width times height of an image, before it is decoded.")
    max_side: int = Field(2048, ge=56, description="The longer side that is sent on; larger images are reduced.")
    image_hosts: list[str] = Field([], description="Hosts that image_url may name; none: data: URIs only.")
    burned_in: Literal["refuse", "refuse-unless-no", "allow"] = Field(
        "refuse", description="DICOM with BurnedInAnnotation YES (refuse), or with anything but NO (refuse-unless-no)."
    )

    # decisions
    match_threshold: float = Field(0.5, ge=0, le=1, description="Least score of region and text for an answer.")
    confidence_threshold: float = Field(0.0, ge=0, le=1, description="Least confidence for an answer.")
    finding_margin: float = Field(0.1, ge=0, lt=0.5, description="A finding between 0.5 ± this is not decided.")
    max_tokens: int = Field(512, ge=1, description="Tokens of a diagnosis, at most; chat requests name their own.")

    # who may call
    authentication: bool = Field(True, description="Off: everybody may call, in development only.")
    key_cache_seconds: float = Field(30.0, ge=0, description="How long a revoked key may still be taken.")
    oidc_issuer: str = Field("", description="Issuer whose JWTs are taken beside API keys; empty: none.")
    oidc_audience: str = Field("", description="Audience that those JWTs must have.")
    oidc_jwks_url: str = Field("", description="Their keys; empty: found through the issuer.")
    oidc_scope_claim: str = Field("scope", description="The claim that lists scopes.")

    # what is kept
    database: str = Field("", description="SQLAlchemy URL; empty: SQLite in data_dir.")
    job_items: int = Field(1000, ge=1, description="Items of a job.")
    job_days: float = Field(7.0, gt=0, description="How long a job's results are kept.")
    job_concurrency: int = Field(4, ge=1, description="Items of jobs that are with an upstream at once.")
    idempotency_hours: float = Field(24.0, gt=0)
    audit_fsync: bool = Field(True, description="Off: the last moments' rows may be lost with the machine's power.")

    # what is measured
    reference: Path | None = Field(None, description="reference.json of the release, for drift.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("rate", "quota")
    @classmethod
    def _is_rate(cls, value: str) -> str:
        if not _RATE.fullmatch(value):
            raise ValueError(f"{value!r} is not a rate such as 120/minute")
        return value

    @field_validator("stable", "candidate", "oidc_issuer", "oidc_jwks_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value and not re.match(r"https?://[^/]+", value):
            raise ValueError(f"{value!r} is not an http(s) URL")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.routing is not None and (both := sorted(_ROUTED & self.model_fields_set)):
            raise ValueError(f"{', '.join(both)}: has no effect where routing names a file that says it")
        if self.candidate_weight and not self.candidate:
            raise ValueError("candidate_weight needs candidate, the URL of its predictor")
        if self.oidc_issuer and not self.oidc_audience:
            raise ValueError("oidc_issuer needs oidc_audience, or every application's tokens would be taken")
        for name, needs in (("candidate_release", "candidate"), ("oidc_jwks_url", "oidc_issuer")):
            if getattr(self, name) and not getattr(self, needs):
                raise ValueError(f"{name} has no effect without {needs}")
        if self.environment == "production":
            if len(self.secret_key.get_secret_value()) < 32:
                raise ValueError(
                    f"{PREFIX}SECRET_KEY is the default or too short for production: 32 characters, such "
                    "as `openssl rand -hex 32` prints"
                )
            if not self.authentication:
                raise ValueError(f"{PREFIX}AUTHENTICATION is off, which production does not allow")
        return self

    @property
    def database_url(self) -> str:
        """Where keys, jobs and feedback are kept."""
        return self.database or f"sqlite:///{self.data_dir.resolve() / 'gateway.db'}"


def load() -> Settings:
    """The settings of this process. ValueError names a variable that is wrong or unknown, or a file that is wrong."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    given = {*os.environ, *dotenv_values(ENV_FILE)}
    if unknown := sorted(name for name in given if name.upper().startswith(PREFIX) and name.upper() not in known):
        raise ValueError(f"{', '.join(unknown)}: is not a setting; `python -m serving.gateway --help` lists them")
    settings = Settings()
    if settings.routing is not None:
        routing.read(settings.routing)
    return settings
