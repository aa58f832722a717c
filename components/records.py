"""Records that lie as JSON beside what they describe: read into their class, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from components import storage
from components.settings import Record, UserError

R = TypeVar("R", bound=Record)


def read_record(kind: type[R], url: str, remedy: str) -> R | None:
    """The record at `url`, None where there is none; a UserError, ending in `remedy`, for what is not one."""
    try:
        return kind.model_validate_json(storage.read_bytes(url))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(f"{url} is damaged: {first_problem(error)}; {remedy}") from error


def put_record(record: Record, url: str) -> None:
    storage.put_json(record.model_dump(mode="json"), url)


def json_object(path: Path) -> dict[str, Any]:
    """The object in a local file of JSON, an empty one where there is none: whoever needs a part of it says what is missing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def first_problem(error: ValidationError) -> str:
    """Where and what, of the first of several."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
