"""The space that an Optuna study draws children from, and how a study goes about it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from components.redaction import holds_password
from components.settings import Settings, UserError

Value = bool | int | float | str | tuple[float, ...] | None
SECTIONS = ("sae", "training")
"""Of a configuration, whose fields may vary: the rest decides the activation dataset, or how a child is measured."""
OBJECTIVES: Mapping[str, Literal["minimize", "maximize"]] = {
    "loss": "minimize",
    "explained_variance": "maximize",
    "loss_recovered": "maximize",
}


class Range(Settings):
    low: int | float
    high: int | float
    """Both ends count."""
    log: bool = False
    """Evenly in logarithms: for what spans factors."""

    @model_validator(mode="after")
    def _rises(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"space: {self.low:g}..{self.high:g} is not accepted: it must rise, and begin over 0 with :log")
        return self


class StudySettings(Settings):
    space: dict[str, Range | tuple[Value, ...]] = Field(min_length=1)
    """What each field may be, by its dotted name under `sae` or `training`: a range, or some values."""

    trials: int = Field(default=30, ge=1, le=10_000)
    """Children in all, those of earlier calls included."""

    together: int = Field(default=4, ge=1, le=1_000)
    """Children that are drawn at once and trained in lockstep: more are faster, and each is drawn knowing less."""

    objective: Literal["loss", "explained_variance", "loss_recovered"] = "loss"
    """Of the evaluation; `loss` is the normalised MSE on held-out text."""

    sampler: Literal["tpe", "random"] = "tpe"
    """Tree-structured Parzen estimators (Bergstra et al. 2011), or at random."""

    pruner: Literal["median", "halving", "none"] = "none"
    """Stops a training whose loss is worse than the median of the finished ones at as many tokens, or by successive halving."""

    storage: str | None = Field(default_factory=lambda: os.environ.get("SAE_STUDY_STORAGE") or None)
    """Optuna's database, such as `postgresql+psycopg2://user@host/optuna` (the password in PGPASSWORD or ~/.pgpass);
    SAE_STUDY_STORAGE of the machine, or else SQLite in the sweep's folder."""

    @field_validator("storage")
    @classmethod
    def _holds_no_password(cls, storage: str | None) -> str | None:
        if storage is not None and holds_password(storage):
            raise ValueError("study.storage: it holds a password, which would be stored; put that into PGPASSWORD or ~/.pgpass")
        return storage

    @model_validator(mode="after")
    def _pruned_at_equal_tokens(self) -> StudySettings:
        require_fields("space", self.space)
        if any(not isinstance(range_, Range) and not range_ for range_ in self.space.values()):
            raise ValueError("space: one of its fields has no values")
        varied = {"training.tokens", "training.batch_size", "training.log_tokens"} & set(self.space)
        if self.pruner != "none" and varied:
            raise ValueError(
                f"study.pruner: '{self.pruner}' compares trainings at the same tokens, and the space varies "
                f"{', '.join(sorted(varied))}; use none, or fix it"
            )
        return self


def require_fields(what: str, fields: Collection[str]) -> None:
    """A UserError for fields that would change what the children share."""
    for field in fields:
        section, dot, _ = field.partition(".")
        if section not in SECTIONS or not dot:
            raise UserError(
                f"{what}: '{field}' is not accepted: all children are trained and measured on one activation dataset, so that "
                "only fields under sae and training may vary"
            )
    if {"sae.d_sae", "sae.expansion_factor"} <= set(fields):
        raise UserError(f"{what}: sae.d_sae and sae.expansion_factor are both given; give one")


def parse_space(arguments: Sequence[str]) -> dict[str, Any]:
    """`["sae.k=8..64:log", "sae.architecture=topk,batchtopk"]` as on the command line, for `StudySettings.space`."""
    space: dict[str, Any] = {}
    for argument in arguments:
        field, equals, text = argument.partition("=")
        if not equals or not field or not text or field in space:
            raise UserError(
                f"--space: '{argument}' is not of the form field=low..high[:log] or field=value,value, once per field"
            )
        low, dots, rest = text.partition("..")
        if not dots:
            space[field] = [number(value) for value in yaml.safe_load(f"[{text}]")]
            continue
        high, _, scale = rest.partition(":")
        ends = [number(yaml.safe_load(end)) for end in (low, high)]
        if scale not in ("", "log") or not all(isinstance(end, int | float) for end in ends):
            raise UserError(f"--space: '{argument}': a range is written low..high or low..high:log, such as sae.k=8..64:log")
        space[field] = {"low": ends[0], "high": ends[1], "log": scale == "log"}
    return space


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people mean the number."""
    if isinstance(value, str):
        with suppress(ValueError):
            found = float(value)
            return int(found) if found.is_integer() else found
    return value
