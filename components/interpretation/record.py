"""The record of a coder's feature data, and where it lies."""

from __future__ import annotations

from typing import Any

from components import storage
from components.records import read_record
from components.settings import Record


class InterpretationRecord(Record):
    digest: str
    identity: dict[str, Any]
    requested: int
    """Tokens; fewer where there are no more."""
    tokens: int
    """That were looked at."""
    sequences: int
    living: int
    """Features that fired."""


def interpretation_url(sae_url: str) -> str:
    return storage.join(sae_url, "interpretation")


def read_interpretation(sae_url: str, digest: str) -> InterpretationRecord | None:
    """The record beside the coder at `sae_url`, None unless it is the one of that digest."""
    url = storage.join(interpretation_url(sae_url), "interpretation.json")
    record = read_record(InterpretationRecord, url, "delete it to make it anew")
    return record if record is not None and record.digest == digest else None
