"""Feature absorption: where the features that stand for a label stay silent and another one carries it in their place.

Chanin et al. 2024 (arXiv 2409.14507), with the thresholds and the absorption fraction of SAEBench: a probe on the activations
gives a label's direction; the label's main features are the first k of those that fire more on it, as long as each adds to what
a probe on them tells; on a token that the probe tells rightly, absorption is that other features along the direction
carry what the main ones leave. Ours: tokens stand in running text and not in prompts that spell, so it needs no model that can;
a label whose direction is not there (F1 on tokens of other kinds than the probe has seen) is left out and counted; and a
projection is that of `x - b_dec`, which is what features add up to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.evaluation.intervals import LEVEL, RESAMPLES, SEED, multinomial_weights
from components.evaluation.probing import dealt
from components.evaluation.record import Metrics, Row
from components.evaluation.settings import AbsorptionSettings

_TRAIN_SHARE = 7
"""Of ten kinds of token."""
_FEWEST = 10
"""Kinds of token that a label needs, at least."""
_ABSORBER_COSINE, _FULL_COSINE, _PROPORTION, _ABSORBERS, _SILENT = 0.1, 0.025, 0.4, 3, 1e-8


@dataclass(frozen=True, kw_only=True)
class Occurrences:
    """Tokens in text."""

    x: np.ndarray
    """Activations `[n, d_in]`."""
    features: Any
    """SciPy CSR `[n, d_sae]`."""
    kinds: np.ndarray
    """Token ids `[n]`."""
    labels: np.ndarray
    """Index into `names` `[n]`."""
    names: Sequence[str]


def absorption(
    found: Occurrences, decoder: np.ndarray, bias: np.ndarray, settings: AbsorptionSettings
) -> tuple[Metrics, list[Row]]:
    """decoder `[d_sae, d_in]`, bias `[d_in]` -> means over labels with 95% intervals over kinds of token; a row per label.

    `fraction` is the absorption fraction, `full` the share of tokens whose label one other feature has taken over.
    """
    every = np.unique(found.kinds)
    part = dealt([str(kind) for kind in every.tolist()], 10)
    train = np.isin(found.kinds, every[part < _TRAIN_SHARE])
    rows: list[Row] = []
    drawn: list[np.ndarray] = []
    absent = 0
    for label, name in enumerate(found.names):
        positive = found.labels == label
        sides = [len(np.unique(found.kinds[positive & side])) for side in (train, ~train)]
        if sum(sides) < _FEWEST or min(sides) < 2 or positive.all():
            continue
        direction, told, f1 = _direction(found.x, positive, train)
        tested = np.flatnonzero(positive & ~train & told)
        if f1 < settings.minimum_f1 or len(tested) == 0:
            absent += 1
            rows.append({"label": name, "probe_f1": f1, "main_features": None, "fraction": None, "full": None})
            continue
        main = _main_features(found.features, positive, train, settings)
        scores = np.array([_absorbed(found, row, direction, decoder, bias, main) for row in tested.tolist()])
        fraction, full = scores.mean(axis=0).tolist()
        rows.append({"label": name, "probe_f1": f1, "main_features": len(main), "fraction": fraction, "full": full})
        drawn.append(_resampled(scores, found.kinds[tested], SEED + label))
    metrics: Metrics = {"labels": len(drawn), "labels_without_direction": absent}
    measured = [row for row in rows if row["fraction"] is not None]
    for name in ("fraction", "full", "main_features"):
        metrics[name] = float(np.mean([float(row[name] or 0) for row in measured])) if measured else None
    for column, name in enumerate(("fraction", "full")):
        tail = (1 - LEVEL) / 2
        means = np.mean([resampled[:, column] for resampled in drawn], axis=0) if drawn else None
        low, high = (None, None) if means is None else np.quantile(means, [tail, 1 - tail]).tolist()
        metrics |= {f"{name}_low": low, f"{name}_high": high}
    return metrics, rows


def _direction(x: np.ndarray, positive: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A unit vector `[d_in]`, what the probe says of each row (bool `[n]`), and its F1 on rows that it was not fitted on."""
    mean, spread = x[train].mean(axis=0, dtype=np.float64), x[train].std(axis=0, dtype=np.float64)
    spread = np.where(spread > 0, spread, 1.0)
    fitted = _fitted((x[train] - mean) / spread, positive[train])
    told = np.asarray(fitted.predict((x - mean) / spread), dtype=bool)
    direction = fitted.coef_[0] / spread
    return direction / np.linalg.norm(direction), told, _f1(told[~train], positive[~train])


def _main_features(features: Any, positive: np.ndarray, train: np.ndarray, settings: AbsorptionSettings) -> np.ndarray:
    """Of training rows alone: features in the order of how much more they fire on the label, until one adds too little."""
    more = (
        np.asarray(features[train & positive].mean(axis=0)).ravel()
        - np.asarray(features[train & ~positive].mean(axis=0)).ravel()
    )
    order, reached = np.argsort(-more, kind="stable")[: settings.most_main], 0.0
    for k in range(1, len(order) + 1):
        values = features[train][:, order[:k]].toarray().astype(np.float64)
        spread = values.std(axis=0)
        values = values / np.where(spread > 0, spread, 1.0)
        f1 = _f1(np.asarray(_fitted(values, positive[train]).predict(values), dtype=bool), positive[train])
        if k > 1 and f1 - reached < settings.split_f1:
            return order[: k - 1]
        reached = f1
    return order


def _absorbed(
    found: Occurrences, row: int, direction: np.ndarray, decoder: np.ndarray, bias: np.ndarray, main: np.ndarray
) -> tuple[float, float]:
    """The absorption fraction of one token, and whether a single feature has taken it over."""
    sparse = found.features[row]
    active, values = sparse.indices, sparse.data.astype(np.float64)
    along = decoder[active] @ direction
    cosines, shares = along / np.maximum(np.linalg.norm(decoder[active], axis=1), 1e-12), values * along
    whole = float((found.x[row] - bias) @ direction)
    is_main = np.isin(active, main)
    by_main = float(shares[is_main].sum())
    able = np.sort(shares[~is_main & (cosines >= _ABSORBER_COSINE) & (shares > 0)])[::-1][:_ABSORBERS]
    by_others = float(able.sum())
    if whole <= 0 or by_main >= whole or by_others / whole < _PROPORTION:
        fraction = 0.0
    elif by_main <= 0:
        fraction = 1.0
    else:
        taken = min(by_others, whole - by_main)
        fraction = taken / (taken + by_main)
    top = int(shares.argmax()) if len(shares) else None
    silent = not (values[is_main] > _SILENT).any()
    full = top is not None and silent and whole > 0 and cosines[top] >= _FULL_COSINE and shares[top] / whole >= _PROPORTION
    return fraction, float(full)


def _resampled(scores: np.ndarray, kinds: np.ndarray, seed: int) -> np.ndarray:
    """Means of scores `[m, 2]` in each resample of the kinds of token, `[resamples, 2]`."""
    groups = np.unique(kinds, return_inverse=True)[1]
    sums = np.zeros((groups.max() + 1, 3))
    np.add.at(sums, groups, np.hstack([scores, np.ones((len(scores), 1))]))
    whole = np.concatenate(list(multinomial_weights(len(sums), RESAMPLES, seed))) @ sums
    return whole[:, :2] / whole[:, 2:]


def _fitted(x: np.ndarray, positive: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(class_weight="balanced", max_iter=1_000).fit(x, positive)


def _f1(told: np.ndarray, positive: np.ndarray) -> float:
    both = int((told & positive).sum())
    return 2 * both / max(1, int(told.sum()) + int(positive.sum()))
