"""Who explains features, and at what price."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from components.redaction import redacted
from components.settings import Settings


class ExplainerSettings(Settings):
    endpoint: str | None = None
    """Base URL of a server that speaks OpenAI's chat completions, such as `http://localhost:8000/v1`; without one `model` runs
    here."""

    model: str | None = None
    """Its name there; or a Hub name or a local folder. None for no explanations."""

    key_variable: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Z][A-Z0-9_]*$", max_length=128)
    """The environment variable that holds the endpoint's key. The key itself is never part of a configuration."""

    input_price: float | None = Field(default=None, ge=0, le=100_000)
    """Dollars per million tokens that are read; 0 for a server of one's own. An endpoint needs both prices."""

    output_price: float | None = Field(default=None, ge=0, le=100_000)
    """Dollars per million tokens that are written."""

    max_cost: float = Field(default=1.0, ge=0, le=1_000_000)
    """Dollars that one command may spend at most; a request that could go beyond is not sent."""

    concurrency: int = Field(default=4, ge=1, le=256)
    """Requests at a time."""

    answer_tokens: int = Field(default=200, ge=16, le=100_000)
    """Of one answer, at most; a model that thinks first needs more."""

    timeout_seconds: float = Field(default=60.0, gt=0, le=3_600)
    """Without a sign of life from the endpoint; an answer as a whole may take twice as long."""

    attempts: int = Field(default=5, ge=1, le=100)
    """Of a request that finds no server, a busy or a broken one."""

    shown: int = Field(default=20, ge=2, le=200)
    """Examples that an explanation is made from, over all quantiles."""

    scores: tuple[Literal["detection", "fuzzing", "intruder", "specificity"], ...] = (
        "detection", "fuzzing", "intruder", "specificity",
    )  # fmt: skip
    """How an explanation is scored, see `scoring`: each costs about 10 to 20 requests per feature with the numbers below."""

    scored: int = Field(default=50, ge=2, le=1_000)
    """Other examples that it is scored on: so many in which the feature fires, and so many in which it does not."""

    scored_at_once: int = Field(default=5, ge=1, le=50)
    """In one request."""

    @field_validator("endpoint")
    @classmethod
    def _an_address_without_secrets(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
            accepted = "accepted is http:// or https://, a host and a path, without user, key or query"
            raise ValueError(f"interpretation.explainer.endpoint: '{redacted(endpoint)}' is no address of a server; {accepted}")
        return endpoint.rstrip("/")
