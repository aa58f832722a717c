"""Which coder, and how it learns. (Its own pydantic base: this component imports nothing else of the project's.)

Every architecture has settings of its own beside it; see `choice.py` for how one is chosen.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from components.bounds import Bounded


class CoderSettings(Bounded):
    """What every architecture has. A subclass narrows `architecture` to its own name and adds its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    form_first = ("architecture", "expansion_factor", "d_sae", "k", "sparsity_coefficient", "levels")
    version: ClassVar[int] = 1
    """Raised when the same settings and data would no longer give the same weights."""
    decides: ClassVar[tuple[str, ...]] = ("architecture", "decoder_init_norm")
    """Fields that are always part of an identity; `d_sae` and `expansion_factor` are by what they come to."""
    decides_later: ClassVar[tuple[str, ...]] = (
        "skip", "decoder_bias_init", "first_density", "resample_at", "subtract_decoder_bias", "active_subspace",
        "decoder_token_share",
    )  # fmt: skip
    """Fields that came after the version: part of an identity only where they differ from their default."""

    architecture: str
    """Name of the architecture."""

    expansion_factor: float | None = Field(default=None, gt=0)
    """Features per dimension of the activations, `d_sae / d_in`; 8 where `d_sae` is not given either."""

    d_sae: int | None = Field(default=None, ge=1)
    """Number of features; give this or `expansion_factor`."""

    decoder_init_norm: float = Field(default=0.1, gt=0)
    """Norm of each decoder row at the start; its direction is random."""

    skip: bool = False
    """For a transcoder: an affine path beside the features, `x W_skip^T` (Paulo et al. 2025, arXiv 2501.18823)."""

    decoder_bias_init: Literal["zeros", "mean", "geometric_median"] = "zeros"
    """Where new weights put the decoder bias: at zero, or at the mean or the geometric median of what is written (the median
    of the first tokens that are trained on). Elsewhere than at zero, features begin by reading the distance from that point."""

    first_density: float | None = Field(default=None, ge=1e-3, lt=1)
    """Share of tokens on which each feature of new weights is above zero, or above its threshold, by its encoder bias
    (Anthropic, January 2025); the bias is left alone where it is not given."""

    subtract_decoder_bias: bool = False
    """In training features read `x - b_dec`, and the decoder bias learns from that as well (Bricken et al. 2023; SAELens'
    `apply_b_dec_to_input`). What is exported reads x, with encoder biases that make up for it."""

    decoder_token_share: float = Field(default=0.0, ge=0, le=1)
    """Of the direction in which each decoder row of new weights begins: the weight of a token's, as it lies from the decoder
    bias, drawn from the first that are trained on; the rest is random. 0 is random alone."""

    active_subspace: float | None = Field(default=None, gt=0, le=1)
    """Decoder rows (and the columns of an encoder that is no transpose) of new weights begin in the span of the fewest
    principal directions that hold this share of the variance, such as 0.99: for attention outputs, in which many directions are
    all but empty (Wang et al. 2025, arXiv 2508.16929)."""

    resample_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the training at which features that are dead begin anew, at tokens that are reconstructed badly (Bricken et al.
    2023, "Towards Monosemanticity", appendix); AuxK does it without a jump."""

    @model_validator(mode="after")
    def _one_size(self) -> CoderSettings:
        if self.d_sae is not None and self.expansion_factor is not None:
            raise ValueError("sae.d_sae and sae.expansion_factor are both given; give one")
        return self

    def features(self, d_in: int) -> int:
        """`d_sae` for activations of width `d_in`."""
        return self.d_sae if self.d_sae is not None else max(1, round((self.expansion_factor or 8) * d_in))

    def identity(self, d_in: int) -> dict[str, Any]:
        """All that these settings decide of the weights, resolved for activations of width `d_in`."""
        fields, values = type(self).model_fields, self.model_dump(mode="json")
        changed = [name for name in self.decides_later if getattr(self, name) != fields[name].default]
        kept = {name: values[name] for name in (*self.decides, *changed)}
        return {**kept, "version": self.version, "d_sae": self.features(d_in)}


class FromTokens(CoderSettings):
    """Of architectures that begin at tokens where nothing else is said: at equal L0 they then leave less in short trainings."""

    decoder_init_norm: float = Field(default=0.3, gt=0)
    """Norm of each decoder row at the start."""

    decoder_bias_init: Literal["zeros", "mean", "geometric_median"] = "mean"
    """Where new weights put the decoder bias: at zero, or at the mean or the geometric median of what is written (the median
    of the first tokens that are trained on). Elsewhere than at zero, features begin by reading the distance from that point."""

    decoder_token_share: float = Field(default=0.5, ge=0, le=1)
    """Of the direction in which each decoder row of new weights begins: the weight of a token's, as it lies from the decoder
    bias, drawn from the first that are trained on; the rest is random. 0 is random alone."""
