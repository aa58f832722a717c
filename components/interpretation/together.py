"""Which features fire on the same tokens: counted on a uniform sample of the text's tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from components.interpretation.examples import Firings, lots, ranks_of

TOKENS = 1 << 16
"""Of the sample; where the text has no more, all of them."""
_FEATURES = 64
"""Of a token, at most: those that fire most."""
_BLOCK = 256
_STEP = 2.0**-30
"""Overlaps that differ by less may count as equal."""
_LOT = -2
"""In the place of a feature, where lots of tokens alone are drawn."""


class TokenSample:
    """The features that fire on the tokens of largest lots. Memory: `TOKENS` x `_FEATURES` numbers, a few times."""

    def __init__(self, d_sae: int, count: int = TOKENS) -> None:
        self.d_sae, self._count, self._least = d_sae, count, -1
        self._lots, self._counts, self._features = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32)

    def add(self, found: Firings) -> None:
        drawn = lots(found.documents, found.positions, torch.tensor(_LOT, device=found.documents.device))
        wanted = drawn > self._least
        kept = wanted[found.tokens]
        parts = (drawn[wanted], found.tokens[kept], found.features[kept], found.values[kept])
        some, tokens, features, values = (part.cpu().numpy() for part in parts)
        numbers = np.cumsum(wanted.cpu().numpy()) - 1
        tokens = numbers[tokens]
        counts = np.bincount(tokens, minlength=len(some))
        crowded = np.flatnonzero((counts > _FEATURES)[tokens])
        order = crowded[np.lexsort((features[crowded], -values[crowded], tokens[crowded]))]
        features = np.delete(features, order[ranks_of(tokens[order]) >= _FEATURES])
        self._include(some, np.minimum(counts, _FEATURES), features)

    def continue_after(self, earlier: TokenSample) -> None:
        """Of a new one: tokens that `earlier` would not keep are not kept here either."""
        earlier._cut()
        self._least = earlier._least

    def include(self, other: TokenSample) -> None:
        self._include(other._lots, other._counts, other._features)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for `restore`."""
        self._cut()
        return {"token_lots": self._lots, "token_counts": self._counts, "token_features": self._features}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._include(arrays["token_lots"], arrays["token_counts"], arrays["token_features"])

    def _include(self, drawn: np.ndarray, counts: np.ndarray, features: np.ndarray) -> None:
        self._lots = np.concatenate([self._lots, drawn])
        self._counts = np.concatenate([self._counts, counts.astype(np.int32)])
        self._features = np.concatenate([self._features, features.astype(np.int32)])
        if len(self._lots) > 2 * self._count:
            self._cut()

    def _cut(self) -> None:
        """To the tokens of largest lots, in their order."""
        order = np.argsort(-self._lots, kind="stable")[: self._count]
        starts, counts = (self._counts.cumsum(dtype=np.int64) - self._counts)[order], self._counts[order]
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum(dtype=np.int64) - counts, counts)
        self._features = self._features[np.repeat(starts, counts) + within]
        self._lots, self._counts = self._lots[order], counts
        if len(order) == self._count:
            self._least = int(self._lots[-1])

    def nearest(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each feature the others that fire with it, by the share of the tokens on which either fires that both fire on
        (Jaccard): features `[d_sae, count]`, -1 where there are no more; of the feature's own tokens the share on which they
        fire too; the Jaccard index."""
        from scipy.sparse import csc_array, csr_array

        self._cut()
        offsets = np.concatenate([[0], self._counts.cumsum(dtype=np.int64)])
        shape = (len(self._lots), self.d_sae)
        firing = csr_array((np.ones(len(self._features), np.float32), self._features, offsets), shape=shape)
        by_feature, totals = csc_array(firing), np.bincount(self._features, minlength=self.d_sae).astype(np.float32)
        others = np.full((self.d_sae, count), -1, np.int32)
        shares, overlaps = np.zeros((self.d_sae, count), np.float32), np.zeros((self.d_sae, count), np.float32)
        for first in range(0, self.d_sae, _BLOCK):
            product = by_feature[:, first : first + _BLOCK].T @ firing
            rows, found = first + np.repeat(np.arange(product.shape[0]), np.diff(product.indptr)), product.indices
            product.data[rows == found] = 0.0
            both = product.data
            either = totals[rows] + totals[found] - both  # counts under 2^24: exact
            rough = both / either
            dense = csr_array((rough, found, product.indptr), shape=product.shape).toarray()
            last = torch.from_numpy(dense).topk(min(count, self.d_sae), dim=1).values[:, -1].numpy()
            some = (both > 0) & (rough >= (last * np.float32(1 - 1e-5) - np.float32(2 * _STEP))[rows - first])
            rows, found, both = rows[some], found[some], both[some].astype(np.float64)
            overlap = both / either[some]
            # Of equal ones those of smaller numbers, whatever the order in which they are looked at.
            order = np.lexsort((found, -(overlap / _STEP).astype(np.int64), rows))
            ranks = ranks_of(rows[order])
            order, ranks = order[ranks < count], ranks[ranks < count]
            own = rows[order]
            others[own, ranks], overlaps[own, ranks] = found[order], overlap[order]
            shares[own, ranks] = both[order] / totals[own]
        return others, shares, overlaps
