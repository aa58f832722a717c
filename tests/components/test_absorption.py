"""Absorption that was planted is found, to the token; a label without a direction is not measured."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from components.evaluation.absorption import Occurrences, absorption
from components.evaluation.probing import dealt
from components.evaluation.settings import AbsorptionSettings

SETTINGS = AbsorptionSettings()
KINDS, EACH, WIDTH = 120, 4, 16


def planted(absorbed: set[int], partly: set[int] = frozenset(), noise: float = 0.0) -> tuple[Occurrences, np.ndarray]:
    """Kinds under 60 have label 0, which is direction 0 with strength 4. Feature 0 writes it, but on `absorbed` kinds feature 1
    does in its place (together with direction 1), and on `partly` ones each half. Other features are of one kind each."""
    kinds = np.repeat(np.arange(KINDS), EACH)
    decoder = np.zeros((2 + KINDS, WIDTH))
    decoder[0, 0] = 1.0
    decoder[1, :2] = np.sqrt(0.5)
    random = np.random.default_rng(0).normal(size=(KINDS, WIDTH - 2))
    decoder[2:, 2:] = random / np.linalg.norm(random, axis=1, keepdims=True)
    features = np.zeros((len(kinds), len(decoder)))
    for row, kind in enumerate(kinds):
        features[row, 2 + kind] = 1.0
        if kind < KINDS // 2:
            share = 1.0 if kind in absorbed else 0.5 if kind in partly else 0.0
            features[row, 0] = 4.0 * (1 - share)
            features[row, 1] = 4.0 * share * np.sqrt(2)
    bias = np.full(WIDTH, 3.0)
    x = features @ decoder + bias + noise * np.random.default_rng(1).normal(size=(len(kinds), WIDTH))
    labels = (kinds >= KINDS // 2).astype(np.int64)
    return Occurrences(x=x, features=csr_matrix(features), kinds=kinds, labels=labels, names=("here", "there")), decoder


def left_for_the_test() -> np.ndarray:
    every = np.arange(KINDS)
    return every[(dealt([str(kind) for kind in every], 10) >= 7) & (every < KINDS // 2)]


def test_the_share_of_tokens_that_another_feature_took_over_is_found():
    kinds = left_for_the_test()
    found, decoder = planted(absorbed=set(kinds[:3].tolist()))
    metrics, rows = absorption(found, decoder, np.full(WIDTH, 3.0), SETTINGS)
    here = next(row for row in rows if row["label"] == "here")
    assert here["main_features"] == 1
    assert here["full"] == pytest.approx(3 / len(kinds))
    assert here["fraction"] == pytest.approx(3 / len(kinds))
    assert here["probe_f1"] == 1.0
    assert metrics["full_low"] <= metrics["full"] <= metrics["full_high"]


def test_half_a_takeover_is_half_of_the_fraction_and_no_full_one():
    """The probe's direction is all but direction 0, so halves are halves to a few percent."""
    kinds = left_for_the_test()
    found, decoder = planted(absorbed=set(), partly=set(kinds[:4].tolist()))
    (here, *_) = absorption(found, decoder, np.full(WIDTH, 3.0), SETTINGS)[1]
    assert here["full"] == 0.0
    assert here["fraction"] == pytest.approx(4 / len(kinds) * 0.5, rel=0.15)


def test_without_absorption_it_is_zero():
    found, decoder = planted(absorbed=set())
    metrics, (here, *_) = absorption(found, decoder, np.full(WIDTH, 3.0), SETTINGS)
    assert (here["fraction"], here["full"], here["main_features"]) == (0.0, 0.0, 1)
    assert metrics["labels"] >= 1


def test_a_label_that_the_activations_do_not_hold_is_left_out_and_counted():
    found, decoder = planted(absorbed=set())
    generator = np.random.default_rng(3)
    chance = generator.permutation(KINDS) < 20
    unseen = Occurrences(
        x=found.x, features=found.features, kinds=found.kinds, labels=(~chance[found.kinds]).astype(np.int64), names=("a",)
    )
    metrics, (row,) = absorption(unseen, decoder, np.full(WIDTH, 3.0), SETTINGS)
    assert (metrics["labels"], metrics["labels_without_direction"], metrics["fraction"]) == (0, 1, None)
    assert row["probe_f1"] < 0.6
    assert metrics["fraction_low"] is None
