"""Texts to look for features with: pairs with a contrast, harmless text, and the same meanings in several languages.

Those that ship lie in `sets/`; a user's own are YAML of the same form.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from components.records import first_problem
from components.settings import Record, UserError
from components.yaml_text import YamlError, parse_yaml, read_text

LEAST_PAIRS = 8
"""Half of them choose, half of them measure: of fewer, no finding could be told from luck."""
_NAME = r"^[a-z0-9][a-z0-9_-]*$"
_HARMLESS, _PARALLEL = "harmless", "parallel"


class Pair(Record):
    text: str = Field(min_length=1, max_length=4_000)
    """Has what is looked for."""
    against: str = Field(min_length=1, max_length=4_000)
    """As like it as can be, without."""


class PromptSet(Record):
    name: str = Field(pattern=_NAME, max_length=64)
    about: str = Field(min_length=1, max_length=400)
    pairs: tuple[Pair, ...] = Field(min_length=LEAST_PAIRS, max_length=1_000)

    @model_validator(mode="after")
    def _no_text_stands_twice(self) -> PromptSet:
        seen: dict[str, int] = {}
        for number, pair in enumerate(self.pairs):
            for text in (pair.text, pair.against):
                if text in seen:
                    raise ValueError(f"pairs.{number}: {text!r} stands in pairs.{seen[text]} already; each text counts once")
                seen[text] = number
        return self


class Harmless(Record):
    name: str = Field(pattern=_NAME, max_length=64)
    about: str
    texts: tuple[str, ...] = Field(min_length=1)


class Parallel(Record):
    name: str = Field(pattern=_NAME, max_length=64)
    about: str = Field(min_length=1, max_length=400)
    languages: tuple[str, ...] = Field(min_length=4, max_length=100)
    """Every second one chooses features, the others measure them."""
    meanings: tuple[dict[str, str], ...] = Field(min_length=4, max_length=1_000)
    """Each by language."""

    @model_validator(mode="after")
    def _every_meaning_is_there_in_every_language(self) -> Parallel:
        for number, meaning in enumerate(self.meanings):
            missing = [language for language in self.languages if not meaning.get(language, "").strip()]
            if missing or len(meaning) != len(self.languages):
                raise ValueError(
                    f"meanings.{number}: holds {', '.join(meaning)}; accepted is a text in each of {', '.join(self.languages)}"
                )
        return self


def shipped_sets() -> dict[str, Path]:
    """Sets of pairs that ship with the project, by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml")) if path.stem not in (_HARMLESS, _PARALLEL)}


def load_sets(names: Sequence[str], field: str) -> list[PromptSet]:
    """Those of shipped names and YAML files; all that ship where none is named. A UserError that names `field`."""
    shipped = shipped_sets()
    found = [_load(PromptSet, name, shipped, field) for name in (names or shipped)]
    twice = next((one.name for number, one in enumerate(found) if one.name in [other.name for other in found[:number]]), None)
    if twice is not None:
        raise UserError(f"{field}: two sets are named '{twice}'; each needs a name of its own")
    return found


def load_harmless() -> Harmless:
    return _load(Harmless, _HARMLESS, {_HARMLESS: _folder() / f"{_HARMLESS}.yaml"}, "harmless")


def load_parallel(name: str | None, field: str) -> Parallel:
    """The shipped one where none is named."""
    return _load(Parallel, name or _PARALLEL, {_PARALLEL: _folder() / f"{_PARALLEL}.yaml"}, field)


R = TypeVar("R", bound=Record)


def _load(kind: type[R], name: str, shipped: dict[str, Path], field: str) -> R:
    path = Path(name) if os.path.isfile(name) else shipped.get(name)
    if path is None:
        raise UserError(
            f"{field}: there is no file '{name}' and no such set; there are {', '.join(shipped)}, or give a YAML file"
        )
    try:
        tree: Any = parse_yaml(read_text(path))
    except YamlError as error:
        raise UserError(f"{field}: '{name}' {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: '{name}' cannot be read as text: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{field}: '{name}' holds a {type(tree).__name__}; accepted is a mapping with {', '.join(kind.model_fields)}"
        )
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        said = str(first["ctx"]["error"]) if first["type"] == "value_error" else first_problem(error)
        raise UserError(f"{field}: '{name}': {said}; accepted is a mapping with {', '.join(kind.model_fields)}") from error


def _folder() -> Path:
    return Path(str(resources.files("components.interpretation") / "sets"))
