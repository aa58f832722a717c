"""Features that tell some texts from others: chosen on one half of the texts, measured on the other.

Of thousands of features some separate any few texts by luck. So those that separate the first half best are chosen there, and
what is said of them comes from texts that had no part in the choice, with p corrected for how many were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.settings import Record

_Z = 1.959963984540054
"""Of a 95% interval."""
_ENTRIES_AT_ONCE = 1 << 22

Array = np.ndarray


class Rate(Record):
    """A share of texts, with its 95% interval (Wilson 1927)."""

    count: int
    of: int
    share: float
    low: float
    high: float


class Effect(Record):
    """How much larger a feature's activations are in some texts than in others."""

    auroc: float
    """Chance that it is larger in one of the first than in one of the others, ties counted half; 0.5 says nothing."""
    auroc_low: float
    auroc_high: float
    """95%, by Newcombe's method 5 (2006), which has a width where all are told apart, too."""
    difference: float | None
    """Of the means, in pooled standard deviations (Hedges' g); None where nothing varies."""
    difference_low: float | None
    difference_high: float | None
    p: float
    """Of the one-sided test of Mann and Whitney."""


class Found(Record):
    """A feature that was chosen on one part of the texts, as it is on the other."""

    feature: int
    chosen_auroc: float
    """Where it was chosen: too good, since it was chosen for it."""
    held_out: Effect
    threshold: float
    """An activation that separates best where it was chosen; a text counts as hit above it."""
    hits: Rate
    """Of the held-out texts."""
    false_alarms: Rate
    """Of the held-out texts against which they stand."""


def aurocs(values: Array, positive: Array) -> Array:
    """Of each feature, float64 `[d_sae]`. values `[n, d_sae]`, positive bool `[n]`, some of which are and some are not."""
    from scipy.stats import rankdata

    ones, zeros = int(positive.sum()), int((~positive).sum())
    found = np.empty(values.shape[1])
    step = max(1, _ENTRIES_AT_ONCE // len(values))
    for start in range(0, values.shape[1], step):
        ranks = rankdata(values[:, start : start + step], axis=0)
        found[start : start + step] = (ranks[positive].sum(axis=0) - ones * (ones + 1) / 2) / (ones * zeros)
    return found


def choose(values: Array, positive: Array, count: int) -> list[int]:
    """The features of `values` `[n, d_sae]` that are larger where `positive`, those that separate best first: by AUROC, and of
    equal ones by the difference of the means, as decoder rows are of one length and the larger one adds more."""
    separation = aurocs(values, positive)
    order = np.lexsort((values[~positive].mean(axis=0) - values[positive].mean(axis=0), -separation))
    return [int(feature) for feature in order[:count] if separation[feature] > 0.5]


def check(values: Array, positive: Array, chosen_on: Array, count: int) -> list[Found]:
    """The `count` best of `choose` on the texts `chosen_on` (bool `[n]`), each measured on the rest; best there first."""
    here, there = (values[chosen_on], positive[chosen_on]), (values[~chosen_on], positive[~chosen_on])
    found = []
    for feature in choose(*here, count):
        threshold = best_threshold(here[0][:, feature], here[1])
        above, kinds = there[0][:, feature] > threshold, there[1]
        found.append(
            Found(
                feature=feature,
                chosen_auroc=float(aurocs(here[0][:, [feature]], here[1])[0]),
                held_out=effect(there[0][:, feature], kinds),
                threshold=threshold,
                hits=rate(above[kinds]),
                false_alarms=rate(above[~kinds]),
            )
        )
    return sorted(found, key=lambda one: -one.held_out.auroc)  # of equal ones, in the order of choice


def effect(values: Array, positive: Array) -> Effect:
    """Of one feature. values `[n]`, positive bool `[n]`."""
    from scipy.stats import mannwhitneyu

    auroc = float(aurocs(values[:, None], positive)[0])
    ones, zeros = values[positive], values[~positive]
    low, high = auroc_interval(auroc, len(ones), len(zeros))
    difference = float(_standardised(values[:, None], positive)[0])
    spread = np.sqrt(1 / len(ones) + 1 / len(zeros) + difference**2 / (2 * len(values))) if np.isfinite(difference) else None
    varies = bool((values != values[0]).any())
    return Effect(
        auroc=auroc,
        auroc_low=low,
        auroc_high=high,
        difference=None if spread is None else difference,
        difference_low=None if spread is None else difference - _Z * spread,
        difference_high=None if spread is None else difference + _Z * spread,
        p=float(mannwhitneyu(ones, zeros, alternative="greater").pvalue) if varies else 1.0,
    )


def auroc_interval(auroc: float, ones: int, zeros: int) -> tuple[float, float]:
    """All values from which the measured one is less than 1.96 of *their* standard errors away (Newcombe 2006, method 5)."""
    from scipy.optimize import brentq

    half = (ones + zeros) / 2 - 1

    def away(true: float) -> float:
        more = half * ((1 - true) / (2 - true) + true / (1 + true))
        return float((auroc - true) ** 2 - _Z**2 * true * (1 - true) * (1 + more) / (ones * zeros))

    # at 0 and 1 themselves the standard error is 0, and they are roots that say nothing
    low = 0.0 if auroc == 0 else brentq(away, 0.0, min(auroc, 1 - 1e-9))
    high = 1.0 if auroc == 1 else brentq(away, max(auroc, 1e-9), 1.0)
    return float(low), float(high)


def best_threshold(values: Array, positive: Array) -> float:
    """Half way between two activations, where most of `positive` less most of the others lie above (Youden's J); never
    under 0, below which no feature fires."""
    levels = np.unique(np.maximum(values, 0.0))
    between = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2])
    gains = [float((values[positive] > level).mean() - (values[~positive] > level).mean()) for level in between]
    return float(between[int(np.argmax(gains))])


def rate(hits: Array) -> Rate:
    """hits: bool `[n]`."""
    count, of = int(hits.sum()), len(hits)
    if of == 0:
        return Rate(count=0, of=0, share=0.0, low=0.0, high=1.0)
    share, square = count / of, _Z**2
    middle = (share + square / (2 * of)) / (1 + square / of)
    wide = _Z * np.sqrt(share * (1 - share) / of + square / (4 * of**2)) / (1 + square / of)
    return Rate(count=count, of=of, share=share, low=max(0.0, float(middle - wide)), high=min(1.0, float(middle + wide)))


def holm(ps: Sequence[float]) -> list[float]:
    """p values so corrected that among all of them one false finding has at most the chance that they say (Holm 1979)."""
    order, found, least = np.argsort(ps, kind="stable"), [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(ps) - place) * ps[index]))
        found[index] = least
    return found


def _standardised(values: Array, positive: Array) -> Array:
    """Hedges' g of each feature, `[d_sae]`: 0 where nothing varies, infinite where only the two sides differ."""
    ones, zeros = values[positive].astype(np.float64), values[~positive].astype(np.float64)
    free = len(ones) + len(zeros) - 2
    apart = ones.mean(axis=0) - zeros.mean(axis=0)
    squares = ((ones - ones.mean(axis=0)) ** 2).sum(axis=0) + ((zeros - zeros.mean(axis=0)) ** 2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = apart / np.sqrt(squares / max(1, free)) * (1 - 3 / (4 * free - 1) if free > 0 else 1.0)
    return np.where(apart == 0, 0.0, found)
