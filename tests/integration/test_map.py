"""The map of many features, by UMAP: here, since it is compiled first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from components.interpretation.layout import MOST_BY_TSNE, layout

pytestmark = pytest.mark.integration


def test_directions_around_common_axes_lie_together_and_the_same_every_time():
    random = torch.Generator().manual_seed(0)
    count = MOST_BY_TSNE + 100
    number = torch.arange(count) % 40
    axes = torch.nn.functional.normalize(torch.randn(40, 64, generator=random), dim=1)
    rows = (axes[number] + 0.05 * torch.randn(count, 64, generator=random)) * torch.rand(count, 1, generator=random).add(0.1)
    living = torch.ones(count, dtype=torch.bool)
    living[7] = False
    found = layout(rows, living)
    assert np.isnan(found[7]).all()
    assert np.nanmax(np.abs(found)) == pytest.approx(1.0)
    places, numbers = found[living.numpy()], number[living].numpy()
    apart = np.linalg.norm(places[:200, None] - places[None], axis=2)
    apart[np.arange(200), np.arange(200)] = np.inf
    assert (numbers[apart.argmin(axis=1)] == numbers[:200]).mean() > 0.95
    assert np.array_equal(layout(rows, living), found, equal_nan=True)
