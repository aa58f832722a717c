"""How an SAE is measured on held-out documents."""

from __future__ import annotations

from pydantic import Field

from components.settings import Settings


class EvaluationSettings(Settings):
    tokens: int = Field(default=100_000, ge=1)
    """Held-out tokens to measure on, at most; all that `corpus.held_out_tokens` prepared where there are fewer."""

    exclude_norms_above: float | None = Field(default=None, gt=1)
    """Leave out tokens whose activation norm is over so many times the median (10 is usual); none where not given."""

    batch_sequences: int = Field(default=16, ge=1)
    """Sequences in one forward pass; it decides memory (two sets of logits), not results."""
