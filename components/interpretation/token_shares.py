"""On which tokens of the vocabulary each feature fires, from a uniform sample of the tokens on which it does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from components.interpretation.examples import Found

SAMPLED = 100
"""Tokens of each feature; of one that fires on no more, all of them."""


@dataclass(frozen=True)
class TokenShares:
    """A row per feature and token of the vocabulary: by feature, the tokens of largest shares first."""

    features: np.ndarray
    ids: np.ndarray
    shares: np.ndarray
    """Of the sampled tokens on which the feature fires, those that are this one."""
    means: np.ndarray
    """Of the activations on them."""
    largest: np.ndarray


def token_shares(found: Found, count: int) -> TokenShares:
    """At most `count` of each feature; of equal shares, the token of larger mean first, and then of smaller id."""
    order = np.lexsort((found.sampled_values, found.sampled_ids, found.sampled))
    features, ids, values = found.sampled[order], found.sampled_ids[order].astype(np.int64), found.sampled_values[order]
    if len(order) == 0:
        nothing = np.zeros(0, np.float32)
        return TokenShares(features, ids, nothing, nothing, nothing)
    starts = np.flatnonzero(np.diff(features * (1 << 40) + ids, prepend=-1))
    sizes = np.diff(starts, append=len(order))
    means = (np.add.reduceat(values.astype(np.float64), starts) / sizes).astype(np.float32)
    largest = np.maximum.reduceat(values, starts)
    features, ids = features[starts], ids[starts]
    totals = np.bincount(found.sampled)
    best = np.lexsort((ids, -means, -sizes, features))
    firsts = np.flatnonzero(np.diff(features[best], prepend=-1))
    ranks = np.arange(len(best)) - np.repeat(firsts, np.diff(firsts, append=len(best)))
    best = best[ranks < count]
    shares = (sizes[best] / totals[features[best]]).astype(np.float32)
    return TokenShares(features[best], ids[best], shares, means[best], largest[best])
