"""How the features of a coder are shown."""

from __future__ import annotations

from pydantic import Field

from components.settings import Settings


class InterpretationSettings(Settings):
    tokens: int = Field(default=100_000, ge=0)
    """Held-out tokens in which examples are looked for, at most; 0 for no interpretation."""

    examples: int = Field(default=10, ge=1, le=1_000)
    """Of each feature: so many where it fires most, and as many drawn at random from all sequences in which it fires. Memory:
    d_sae x examples x context_length numbers, twice."""

    logits: int = Field(default=10, ge=0, le=1_000)
    """Tokens that each feature makes most and least likely, so many of each."""
