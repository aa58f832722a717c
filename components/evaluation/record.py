"""The evaluation record: what was measured of one coder, and how."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from components import storage
from components.records import read_record
from components.settings import Record

Metrics = dict[str, int | float | None]
"""Flat: names of the table in docs/results.md to numbers, None where one is not defined."""
Row = dict[str, str | int | float | None]


class About(Record):
    """What the report says of the coder."""

    name: str
    language_model: str
    hook_point: str
    architecture: str
    d_in: int
    d_sae: int


class EvaluationRecord(Record):
    """`evaluation.json`, put last: its presence says that the evaluation is whole."""

    digest: str
    identity: dict[str, Any]
    metrics: Metrics
    breakdown: dict[str, list[Row]]
    """`position` and `token_class`: a row per group with its tokens and metrics. `probing`, where asked for: per label."""
    baselines: list[Row]
    """A row per reconstruction, the coder's first, all on the same tokens."""
    about: About
    device: str
    optional: dict[str, Metrics] = Field(default_factory=dict)
    """What was asked for besides, by kind (`probing`): names to numbers, with `_low` and `_high`."""
    warnings: tuple[str, ...] = ()
    """What should be known before a number is believed, a sentence each."""

    @property
    def tokens(self) -> int:
        """That were measured."""
        return int(self.metrics["evaluation_tokens"] or 0)


def record_url(url: str) -> str:
    return storage.join(url, "evaluation.json")


def read_evaluation(url: str, digest: str) -> EvaluationRecord | None:
    """The evaluation beside the artifact at `url`, None unless it is the one of that digest."""
    record = read_record(EvaluationRecord, record_url(url), "delete it to measure anew")
    return record if record is not None and record.digest == digest else None
