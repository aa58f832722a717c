"""Tokens that do not count: one mask for what is stored, trained on and measured.

The first token of a sequence, and a few others, draw the attention that is needed nowhere else; their activations are 10 to
150 times as long as the others and would decide the scale, the mean and every squared error alone (Sun et al. 2024, "Massive
Activations in Large Language Models").
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from components.settings import Record


class Exclusion(Record):
    """`ExcludeSettings`, with norms in numbers."""

    norm_limits: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """The largest norm of a token that counts, at each hook point."""
    positions: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


NOTHING = Exclusion()
