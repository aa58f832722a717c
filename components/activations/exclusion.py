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

_MOST = 0.7
"""Of the squared norm: from there on a few tokens decide scale, mean and loss. Norms as unequal as a log-normal's of sigma 0.75
come to as much; those of a residual stream without sinks to about a tenth."""


def sinks_warning(hook_point: str, mean_squared_norm: float, median_norm: float) -> str | None:
    """One sentence where a few tokens hold most of the squared norm: where its mean is far over the square of the median."""
    if mean_squared_norm <= 0:
        return None
    share = 1 - median_norm**2 / mean_squared_norm
    if share < _MOST:
        return None
    return (
        f"{hook_point}: a few tokens hold about {min(share, 0.999):.1%} of the squared norm, and decide scale, mean and loss "
        "alone; "
        "`activations.exclude` leaves such tokens out (norms_above: 10, or positions: [0])"
    )
