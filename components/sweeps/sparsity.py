"""How many features should be active: by how alike the decoder's rows are.

With too few active features a coder mixes correlated ones into one row, with too many it finds degenerate mixtures; both make
rows alike, so that the mean absolute cosine between them is least near the right L0 (Chanin and Garriga-Alonso 2025, arXiv
2508.16560). It is a proxy, and unlike the loss it does not simply fall with k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.settings import Record
from components.sweeps.record import SweepPoint

_ROWS = 4096
"""Rows that are compared, evenly spread: every pair of a million would be 10^12."""
_LEAST = 3


class SparsityAdvice(Record):
    features: int
    tokens: int
    """The setting it was read at: the largest coder, trained for the longest, at its best learning rate."""
    k: int
    """Whose rows are least alike."""
    l0: float
    decoder_cosine: dict[int, float]
    """Mean absolute cosine between decoder rows, per k that was tried."""
    at_the_end: bool
    """It is the smallest or the largest that was tried, and the least may lie beyond."""


def decoder_cosine(rows: Tensor) -> float:
    """Mean absolute cosine over all pairs of rows `[d_sae, d_out]`, of at most 4,096; 0 for a single row."""
    if len(rows) > _ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, _ROWS, device=rows.device).round().long()]
    if len(rows) < 2:
        return 0.0
    units = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    total = sum((part @ units.T).abs().sum() for part in units.split(512)) - units.square().sum()
    return float(total / (len(rows) * (len(rows) - 1)))


def advise(points: Sequence[SweepPoint]) -> SparsityAdvice | None:
    """None where fewer than three values of k were tried at the largest and longest setting."""
    measured = [point for point in points if point.k is not None and point.decoder_cosine is not None]
    if not measured:
        return None
    size = max((point.features, point.tokens) for point in measured)
    best: dict[int, SweepPoint] = {}
    for point in measured:
        if (point.features, point.tokens) == size and point.k is not None:
            other = best.get(point.k)
            if other is None or (point.loss or 0.0) < (other.loss or 0.0):
                best[point.k] = point
    if len(best) < _LEAST:
        return None
    cosines = {k: float(best[k].decoder_cosine or 0.0) for k in sorted(best)}
    least = min(cosines, key=lambda k: cosines[k])
    return SparsityAdvice(
        features=size[0], tokens=size[1], k=least, l0=best[least].l0 or 0.0, decoder_cosine=cosines,
        at_the_end=least in (min(cosines), max(cosines)),
    )  # fmt: skip
