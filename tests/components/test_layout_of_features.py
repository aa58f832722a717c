"""The map of features: near directions near each other, the same every time, whatever their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from components.interpretation import layout as module
from components.interpretation.layout import layout


def groups(each: int) -> tuple[torch.Tensor, np.ndarray]:
    """Directions around three axes, of different lengths, and the number of their axis."""
    random = torch.Generator().manual_seed(0)
    number = torch.arange(3 * each) % 3
    rows = torch.eye(3, 16)[number] + 0.05 * torch.randn(3 * each, 16, generator=random)
    return rows * torch.rand(3 * each, 1, generator=random).add(0.1), number.numpy()


@pytest.mark.parametrize("most", [5_000, 10])
def test_near_directions_lie_together_whatever_their_lengths(most: int, monkeypatch: pytest.MonkeyPatch):
    """By t-SNE, and by principal components."""
    monkeypatch.setattr(module, "MOST_BY_TSNE", most)
    monkeypatch.setattr(module, "MOST_BY_UMAP", most)
    rows, number = groups(20)
    living = torch.ones(60, dtype=torch.bool)
    living[7] = False
    found = layout(rows, living)
    assert np.isnan(found[7]).all()
    assert np.nanmax(np.abs(found)) == pytest.approx(1.0)
    apart = np.linalg.norm(found[:, None] - found[None], axis=2)
    np.fill_diagonal(apart, np.nan)
    for feature in np.flatnonzero(living.numpy()):
        assert number[np.nanargmin(apart[feature])] == number[feature]
    assert np.array_equal(layout(rows, living), found, equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_a_handful_of_features_has_a_map_too(count: int):
    living = torch.arange(6) < count
    found = layout(torch.eye(6, 8), living)
    assert np.isfinite(found).all(axis=1).tolist() == living.tolist()
