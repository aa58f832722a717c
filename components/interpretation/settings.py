"""How the features of a coder are shown."""

from __future__ import annotations

from pydantic import Field

from components.interpretation.explanations.settings import ExplainerSettings
from components.settings import Settings
from components.storage.addresses import LocalPath


class InterpretationSettings(Settings):
    tokens: int = Field(default=100_000, ge=0)
    """Held-out tokens in which examples are looked for, at most; 0 for no interpretation."""

    examples: int = Field(default=10, ge=1, le=1_000)
    """Sequences of each feature in which it fires most. Memory: d_sae x (examples + drawn) x its activations in a sequence."""

    drawn: int = Field(default=20, ge=1, le=1_000)
    """Tokens of each feature drawn at random from all on which it fires, each shown in its sequence."""

    quantiles: int = Field(default=5, ge=1, le=100)
    """Groups of equal size, by activation, in which the drawn tokens are shown."""

    logits: int = Field(default=10, ge=0, le=1_000)
    """Tokens that each feature makes most and least likely, so many of each."""

    safety: bool = False
    """Whether a run makes the safety report (`sae features safety`) as well: which features separate prompts of several kinds
    of harm from their contrast."""

    prompt_sets: tuple[LocalPath, ...] = ()
    """YAML files with sets of your own for that report, beside those that ship."""

    explainer: ExplainerSettings = ExplainerSettings()
    """Who says in words what features stand for (`sae features explain`)."""
