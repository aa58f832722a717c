"""Which sparse autoencoder. (Its own pydantic base: this component imports nothing else of the project's.)"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from components.bounds import Bounded


class SAESettings(Bounded):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    architecture: Literal["relu"] = "relu"
    """Activation function of the encoder: `relu` is that of Templeton et al. 2024."""

    expansion_factor: float | None = Field(default=None, gt=0)
    """Features per dimension of the activations, `d_sae / d_in`; 8 where `d_sae` is not given either."""

    d_sae: int | None = Field(default=None, ge=1)
    """Number of features; give this or `expansion_factor`."""

    decoder_init_norm: float = Field(default=0.1, gt=0)
    """Norm of each decoder row at the start; its direction is random."""

    @model_validator(mode="after")
    def _one_size(self) -> SAESettings:
        if self.d_sae is not None and self.expansion_factor is not None:
            raise ValueError("sae.d_sae and sae.expansion_factor are both given; give one")
        return self

    def features(self, d_in: int) -> int:
        """`d_sae` for activations of width `d_in`."""
        return self.d_sae if self.d_sae is not None else max(1, round((self.expansion_factor or 8) * d_in))
