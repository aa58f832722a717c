"""The base of every settings class, and the error that means "the user must change something"."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.bounds import Bounded

_LONGEST_SENTENCE = 2_000


class UserError(ValueError):
    """A mistake that only the user can mend: one sentence with the field, the value and what is accepted.

    It stays in one line and of a length that somebody reads, whatever value is in it.
    """

    def __init__(self, sentence: str) -> None:
        sentence = sentence.replace("\r", "\\r").replace("\n", "\\n")
        if len(sentence) > _LONGEST_SENTENCE:
            half = _LONGEST_SENTENCE // 2
            sentence = f"{sentence[: half - 5]} ... {sentence[-half:]}"
        super().__init__(sentence)


def first_line(error: Exception) -> str:
    """What a library says of a mistake: its last line where the first one only introduces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return said if " " in said else f"{type(error).__name__}: {said}"


class Record(BaseModel):
    """Frozen, unknown keys refused; the string under each field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class Settings(Bounded, Record):
    """What a user sets: a record whose numbers all have bounds, see `components.bounds`."""


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash already, and nothing has to be asked of a hub."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def digest(identity: Any) -> str:
    """16 hexadecimal digits that name everything in `identity` (plain JSON values), whatever the order of its keys."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(canonical.encode("utf-8")).hexdigest()[:16]
