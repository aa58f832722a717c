"""The best learning rate as a function of the number of features and the length of the training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.settings import Record
from components.sweeps.laws import Array, interval
from components.sweeps.record import SweepPoint

_LEAST_RATES = 3


class BestRate(Record):
    """`rate = coefficient * n^exponent * D^tokens_exponent` where a law could be fitted, and what was best of what was tried in
    any case."""

    coefficient: float | None = None
    exponent: float | None = None
    low: float | None = None
    high: float | None = None
    """90% interval of the exponent."""
    tokens_exponent: float = 0.0
    """Of the tokens D of a training, where the sweep varies them: longer ones want a smaller rate."""
    tried: dict[int, float]
    """Per number of features the rate that was best in most settings; of a tie the one of the longest training."""
    smallest: float
    largest: float
    """Of those that were tried."""
    said: str
    """How the rate is chosen, for people."""

    def at(self, features: float, tokens: float) -> float:
        """Within what was tried; without a law, the best at the nearest size."""
        if self.coefficient is None or self.exponent is None:
            return self.tried[min(self.tried, key=lambda n: abs(np.log(n / features)))]
        rate = self.coefficient * features**self.exponent * tokens**self.tokens_exponent
        return float(np.clip(rate, self.smallest, self.largest))


def best_learning_rate(points: Sequence[SweepPoint], draws: int, seed: int = 0) -> BestRate:
    """From `log L = c_setting + kappa (log rate - p - q log n - r log D)^2`, a parabola that settings share and whose lowest
    point moves with n and D: linear in what is fitted once the mean of each setting is taken away."""
    rates = sorted({point.learning_rate for point in points})
    tried, smallest, largest = _tried(points), rates[0], rates[-1]

    def without(said: str) -> BestRate:
        return BestRate(tried=tried, smallest=smallest, largest=largest, said=said)

    settings: dict[tuple[int, int, int | None], list[SweepPoint]] = {}
    for point in points:
        settings.setdefault((point.features, point.tokens, point.k), []).append(point)
    kept = [found for found in settings.values() if len(found) >= _LEAST_RATES]
    if not kept or len({found[0].features for found in kept}) < 2:
        return without(f"the best of the {len(rates)} that were tried at the nearest size: no law, which needs three rates")
    lengths = len({found[0].tokens for found in kept})
    design, target = [], []
    for found in kept:
        x = np.log([point.learning_rate for point in found])
        y = np.log([point.loss or np.nan for point in found])
        moving = [np.log(found[0].features), *([np.log(found[0].tokens)] if lengths > 1 else [])]
        columns = np.stack([x**2, x, *(x * by for by in moving)], axis=1)
        design.append(columns - columns.mean(axis=0))
        target.append(y - y.mean())
    matrix, losses = np.concatenate(design), np.concatenate(target)
    found_, *_ = np.linalg.lstsq(matrix, losses, rcond=None)
    if found_[0] <= 0:
        return without("the best of those that were tried at the nearest size: loss has no minimum between them")
    freedom = max(1, len(losses) - len(kept) - matrix.shape[1])
    left = losses - matrix @ found_
    left = (left - left.mean()) * np.sqrt(len(losses) / freedom)
    generator = np.random.default_rng(seed)
    again = (matrix @ found_)[None] + left[generator.integers(len(losses), size=(draws, len(losses)))]
    drawn = np.linalg.lstsq(matrix, again.T, rcond=None)[0].T
    p, q, *r = _minimum(found_)
    low, high = interval(_minimum(drawn[drawn[:, 0] > 0])[1], freedom)
    return BestRate(
        coefficient=float(np.exp(p)), exponent=float(q), low=low, high=high, tokens_exponent=float(r[0]) if r else 0.0,
        tried=tried, smallest=smallest, largest=largest,
        said="the law in features and tokens, kept within the rates that were tried",
    )  # fmt: skip


def least_loss(points: Sequence[SweepPoint]) -> float:
    """The loss of one setting at its best learning rate, of trainings that differ in the rate alone: the lowest point of the
    parabola, in logarithms, through the best that was tried and its neighbours; what was tried where that is at an end."""
    ordered = sorted(points, key=lambda point: point.learning_rate)
    x = np.log([point.learning_rate for point in ordered])
    y = np.log([point.loss or np.nan for point in ordered])
    place = int(np.nanargmin(y))
    if not 0 < place < len(ordered) - 1 or np.isnan(y[[place - 1, place + 1]]).any():
        return float(np.exp(y[place]))
    near = slice(place - 1, place + 2)
    curve, slope, level = np.polyfit(x[near] - x[place], y[near], 2)
    return float(np.exp(level - slope**2 / (4 * curve))) if curve > 0 else float(np.exp(y[place]))


def _minimum(found: Array) -> Array:
    """p, q and, if it was fitted, r of the lowest point, `log rate = p + q log n + r log D`, along the first axis."""
    return np.moveaxis(-found[..., 1:] / (2 * found[..., :1]), -1, 0)


def _tried(points: Sequence[SweepPoint]) -> dict[int, float]:
    best: dict[tuple[int, int, int | None], SweepPoint] = {}
    for point in points:
        setting = (point.features, point.tokens, point.k)
        if setting not in best or (point.loss or np.inf) < (best[setting].loss or np.inf):
            best[setting] = point
    found: dict[int, list[SweepPoint]] = {}
    for point in best.values():
        found.setdefault(point.features, []).append(point)
    return {
        features: max(
            {one.learning_rate for one in group},
            key=lambda rate: (
                sum(one.learning_rate == rate for one in group),
                max(one.tokens for one in group if one.learning_rate == rate),
            ),
        )
        for features, group in sorted(found.items())
    }
