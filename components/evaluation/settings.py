"""How an SAE is measured on held-out documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.settings import Settings

BaselineName = Literal["identity", "zero", "mean", "pca", "random_directions", "neurons"]


class EvaluationSettings(Settings):
    tokens: int = Field(default=100_000, ge=1)
    """Held-out tokens to measure on, at most; all that `corpus.held_out_tokens` prepared where there are fewer."""

    reference_tokens: int = Field(default=50_000, ge=1)
    """Training tokens that give the mean (of `ce_loss_mean`) and the directions of the PCA baseline."""

    baselines: tuple[BaselineName, ...] = ("identity", "zero", "mean", "pca", "random_directions", "neurons")
    """What the SAE is compared with, each with as many numbers per token as the SAE's L0; empty for none."""

    baseline_tokens: int = Field(default=20_000, ge=1)
    """Held-out tokens, the first of them, for the table of baselines; the SAE's own row there is measured on them too."""

    neighbours: int = Field(default=5, ge=0)
    """Features of the nearest decoder direction to list for each feature; 0 for none (the work grows as d_sae squared)."""

    batch_sequences: int = Field(default=16, ge=1)
    """Sequences in one forward pass, spliced copies included; it decides memory (so many logits), not results."""
