"""The meta-dictionary finds what rows are made of, and says no more of random ones than of random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from components.evaluation.meta_structure import meta_structure
from components.evaluation.settings import MetaStructureSettings

SETTINGS = MetaStructureSettings(k=2, width_ratio=0.2, steps=400, learning_rate=1e-2)


def unit(rows: np.ndarray) -> torch.Tensor:
    return torch.tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=torch.float32)


def test_rows_that_share_few_directions_are_told_from_random_ones():
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(12, 24))
    pairs = np.stack([generator.choice(12, size=2, replace=False) for _ in range(80)])
    composed = (directions[pairs] * generator.uniform(0.5, 1.0, size=(80, 2, 1))).sum(axis=1)
    found = meta_structure(3 * unit(composed), SETTINGS)
    assert (found["features"], found["meta_features"]) == (80, 16)
    assert found["explained_variance_low"] > found["random_explained_variance_high"] + 0.15
    assert found["explained_variance"] > 0.85
    units = unit(composed).double().numpy()
    cosines = units @ units.T - 2 * np.eye(80)
    assert found["nearest_cosine"] == pytest.approx(cosines.max(axis=1).mean(), abs=1e-6)
    # A mean's interval in closed form.
    deviation = cosines.max(axis=1).std() / np.sqrt(80)
    width = found["nearest_cosine_high"] - found["nearest_cosine_low"]
    assert width == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_random_rows_have_no_structure():
    found = meta_structure(unit(np.random.default_rng(1).normal(size=(80, 24))), SETTINGS)
    assert abs(found["explained_variance"] - found["random_explained_variance"]) < 0.06
    assert abs(found["nearest_cosine"] - found["random_nearest_cosine"]) < 0.05


def test_a_coder_without_two_features_that_fire_has_none():
    assert meta_structure(torch.ones(1, 8), SETTINGS) == {"features": 1, "meta_features": 2}
