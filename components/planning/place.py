"""Where a run is to take place: GPUs, how many, what they reach, what things cost there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from components.run.config import error_sentence
from components.settings import Settings, UserError
from components.yaml_text import YamlError, parse_value


@dataclass(frozen=True)
class Gpu:
    memory: int
    """Bytes."""
    peaks: dict[str, float]
    """Dense FLOPs per second by `training.autocast`: float32 without tensor cores, bfloat16 with them."""


GPUS = {
    "a100": Gpu(80 * 10**9, {"none": 19.5e12, "bfloat16": 312e12}),
    "h100": Gpu(80 * 10**9, {"none": 67e12, "bfloat16": 989e12}),
    "h200": Gpu(141 * 10**9, {"none": 67e12, "bfloat16": 989e12}),
    "l4": Gpu(24 * 10**9, {"none": 30e12, "bfloat16": 121e12}),
}
"""By the vendor's data sheets, SXM and the larger memory where there are several."""


class Place(Settings):
    """Each field is one `--on FIELD=VALUE`."""

    gpu: str = "h100"
    """a100, h100, h200 or l4."""

    memory_gb: float | None = Field(default=None, gt=0)
    """Of one GPU, 10^9 bytes; the data sheet's where it is not given."""

    ranks: int | None = Field(default=None, ge=1)
    """GPUs that share the coder's features; `execution.training.feature_parallel`, or else as few as hold it, where it is not
    given."""

    extraction_workers: int = Field(default=1, ge=1)
    """Each with a copy of the language model, on as many GPUs as hold it."""

    utilisation: float = Field(default=0.3, gt=0, le=1)
    """Share of the GPU's peak that is assumed where no throughput is given."""

    training_tokens_per_second: float | None = Field(default=None, gt=0)
    """Measured, of all ranks together."""

    extraction_tokens_per_second: float | None = Field(default=None, gt=0)
    """Measured, of one worker."""

    network_gbit: float | None = Field(default=None, gt=0)
    """Of one machine to the store, 10^9 bits per second."""

    gpus_per_machine: int = Field(default=8, ge=1)

    disk_tb: float | None = Field(default=None, gt=0)
    """That the activation dataset may take, 10^12 bytes."""

    months: float = Field(default=1.0, ge=0)
    """For which it is kept."""

    gpu_hour: float | None = Field(default=None, ge=0)
    """Prices, in any currency: an hour of one GPU,"""

    gb_month: float | None = Field(default=None, ge=0)
    """10^9 bytes for a month,"""

    put_1000: float | None = Field(default=None, ge=0)
    """a thousand writing requests,"""

    get_1000: float | None = Field(default=None, ge=0)
    """and a thousand reading ones."""

    @field_validator("gpu")
    @classmethod
    def _known(cls, name: str) -> str:
        if name.lower() not in GPUS:
            raise ValueError(f"gpu: '{name}' is not known; accepted are {', '.join(GPUS)}")
        return name.lower()

    @property
    def memory(self) -> int:
        """Bytes of one GPU."""
        return GPUS[self.gpu].memory if self.memory_gb is None else int(self.memory_gb * 1e9)

    def flops(self, autocast: str) -> float:
        """Per second and GPU, as assumed."""
        return GPUS[self.gpu].peaks[autocast] * self.utilisation


class ModelOnPaper(Settings):
    """A language model that is not here, each field one `--model FIELD=VALUE`."""

    parameters: int = Field(ge=1)
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    """Of the residual stream, and so of what `resid_*`, `attn_out` and `mlp_out` hold."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """In which its weights are held; `language_model.dtype` where it is not given."""


_S = TypeVar("_S", bound=Settings)


def parse_place(arguments: Sequence[str]) -> Place:
    return _parsed(Place, "--on", arguments)


def parse_model(arguments: Sequence[str]) -> ModelOnPaper:
    return _parsed(ModelOnPaper, "--model", arguments)


def _parsed(kind: type[_S], option: str, arguments: Sequence[str]) -> _S:
    tree = {}
    for argument in arguments:
        field, equals, text = argument.partition("=")
        if not equals or not text or field not in kind.model_fields:
            known = ", ".join(kind.model_fields)
            raise UserError(f"{option}: '{argument}' is not FIELD=VALUE with one of the fields {known}")
        try:
            tree[field] = float(text) if text.replace(".", "", 1).replace("e", "", 1).isdigit() else parse_value(text)
        except YamlError as error:
            raise UserError(f"{option}: the value of '{field}', '{text}', {error}") from error
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{option}: {error_sentence(error.errors()[0])}") from error
