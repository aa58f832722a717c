"""A grid over fields of a configuration, and its children: runs that share one activation dataset."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import Field, model_validator

from components.run.config import parse_config
from components.run.specification import Specification
from components.sae.architectures import architectures
from components.settings import Settings, UserError
from components.sweeps.space import SECTIONS, StudySettings, Value, number, require_fields

Grid = Mapping[str, Sequence[Any]]
"""The values that each field takes, by its dotted name: `{"sae.k": [8, 12], "training.tokens": [1_000_000]}`."""

MOST_CHILDREN = 1_000
_SIZES = ("d_sae", "expansion_factor")


class SweepSettings(Settings):
    grid: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    """The values that each field takes, by its dotted name under `sae` or `training`: every combination is a child."""

    study: StudySettings | None = None
    """In place of a grid: a space that Optuna draws the children from."""

    memory_gb: float | None = Field(default=None, gt=0)
    """What coders in lockstep may take together, 10^9 bytes; most of what is free where it is not given."""

    @model_validator(mode="after")
    def _a_grid_or_a_study(self) -> SweepSettings:
        if bool(self.grid) == (self.study is not None):
            raise ValueError("sweep: a grid or a study; give one of them")
        return self

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gb is None else int(self.memory_gb * 1e9)


@dataclass(frozen=True)
class Child:
    """One combination of values."""

    values: dict[str, Any]
    run: Specification

    @property
    def title(self) -> str:
        """`k 8, learning_rate 0.001`."""
        return ", ".join(f"{field.partition('.')[2]} {value}" for field, value in self.values.items())


def parse_grid(arguments: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`["sae.k=8,12", ...]` as on the command line. A value that holds commas stands in brackets: `[0.9,0.99],[0,0.99]`."""
    grid: dict[str, tuple[Any, ...]] = {}
    for argument in arguments:
        field, equals, text = argument.partition("=")
        if not equals or not field or not text:
            raise UserError(f"--grid: '{argument}' is not of the form field=value,value, such as sae.k=8,12,20")
        if field in grid:
            raise UserError(f"--grid: '{field}' is given twice; give all of its values at once")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError as error:
            raise UserError(f"--grid: the values of '{field}', '{text}', are not YAML") from error
        grid[field] = tuple(number(value) for value in values)
    return grid


def children(base: Specification, grid: Grid) -> list[Child]:
    """Every combination of the grid's values, resolved; the last field varies fastest.

    A UserError for a field that does not exist, that would change what the children share, or whose values are no good.
    """
    if not grid:
        raise UserError("grid: it is empty; give at least one field with its values, such as sae.k=8,12,20")
    require_fields("grid", grid)
    for field, values in grid.items():
        if not values:
            raise UserError(f"grid: '{field}' has no values")
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_CHILDREN:
        raise UserError(f"grid: it has {count:,} children; accepted are at most {MOST_CHILDREN:,}")
    found: dict[str, Child] = {}
    for combination in _combinations(grid):
        child = child_of(base, combination)
        twin = found.setdefault(child.run.sae_digest, child)
        if twin is not child:
            raise UserError(f"grid: '{child.title}' and '{twin.title}' are the same training; leave one out")
    return list(found.values())


def child_of(base: Specification, values: Mapping[str, Any]) -> Child:
    """A UserError for a field that does not exist, or a value that is no good."""
    return Child(dict(values), _resolved(base, values))


def _combinations(grid: Grid) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield {field: list(value) if isinstance(value, tuple) else value for field, value in zip(grid, values, strict=True)}


def _resolved(base: Specification, values: Mapping[str, Any]) -> Specification:
    config = base.config
    tree = {section: getattr(config, section).model_dump(mode="json", exclude_unset=True) for section in SECTIONS}
    if any(f"sae.{name}" in values for name in _SIZES):  # a child has a size of its own, however the base says its
        tree["sae"] = {name: value for name, value in tree["sae"].items() if name not in _SIZES}
    if "sae.architecture" in values and values["sae.architecture"] in architectures():
        # What only the base's architecture has goes; what the grid says stays, and is refused where it is no field.
        known = architectures()[values["sae.architecture"]].Settings.model_fields
        tree["sae"] = {name: value for name, value in tree["sae"].items() if name in known}
    for field, value in values.items():
        section, _, name = field.partition(".")
        tree[section][name] = value
    parsed = parse_config({**config.model_dump(mode="json", exclude=set(SECTIONS)), **tree})
    return base.varied(config.model_copy(update={section: getattr(parsed, section) for section in SECTIONS}))
