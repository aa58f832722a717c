"""Weights in bfloat16, beside the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def in_bfloat16(weight: Tensor) -> Tensor:
    """weight in bfloat16, with its strides: what `keep` has put beside it, if the weight is still what it was then."""
    version, kept = getattr(weight, "_lowered", (None, None))
    return weight.to(torch.bfloat16) if kept is None or version != weight._version else kept


def room(weight: Tensor) -> Tensor:
    """Where to write a weight in bfloat16, to `keep` it."""
    _, kept = getattr(weight, "_lowered", (None, None))
    return torch.empty_like(weight, dtype=torch.bfloat16) if kept is None else kept


def keep(weight: Tensor, kept: Tensor) -> None:
    """`kept` is weight in bfloat16, until somebody changes weight."""
    weight._lowered = (weight._version, kept)  # type: ignore[attr-defined]
