"""Confidence intervals by resampling documents (Efron 1979; percentile method): tokens of one document are no independent
draws, documents are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

RESAMPLES, SEED = 1_000, 0
LEVEL = 0.95
MAXIMUM_GROUPS = 2_048
"""Documents are dealt into so many groups at most, which bounds memory (`groups x d_in` sums) and leaves more than enough
units to draw; with fewer documents than that, a group is a document."""
_WEIGHTS_AT_ONCE = 2**22


class DocumentGroups:
    """Deals documents to groups in the order in which they are first seen."""

    def __init__(self, groups: int = MAXIMUM_GROUPS, first_alone: bool = False) -> None:
        """first_alone: the first document has a group of its own, beside the `groups` of the others."""
        self.groups, self._alone = groups, int(first_alone)
        self._number: dict[int, int] = {}

    def __len__(self) -> int:
        """Documents seen so far."""
        return len(self._number)

    @property
    def most(self) -> int:
        """Groups that there can be."""
        return self.groups + self._alone

    @property
    def used(self) -> int:
        return min(len(self), self.most)

    @property
    def documents(self) -> np.ndarray:
        """Ids in the order in which they were first seen; the first `used` of them opened a group each, in its order."""
        return np.array(list(self._number), dtype=np.int64)

    def of(self, documents: np.ndarray) -> np.ndarray:
        """The group of each id in `documents` `[n]`."""
        ids, first, inverse = np.unique(documents, return_index=True, return_inverse=True)
        for place in np.argsort(first):
            self._number.setdefault(int(ids[place]), len(self._number))
        numbers = np.array([self._number[document] for document in ids.tolist()], dtype=np.int64) - self._alone
        return np.where(numbers < 0, 0, numbers % self.groups + self._alone)[inverse]


def intervals(
    table: np.ndarray,
    shifted: np.ndarray,
    metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, tuple[float, float] | None]:
    """The 95% percentile interval of each metric; None where it is not defined in every resample, or for one document.

    table `[groups, columns]`, shifted `[groups, d_in]`: sums per document. metrics: from sums of each resample
    `[resamples, columns]` and `[resamples, d_in]` to values `[resamples]`.
    """
    drawn: dict[str, list[np.ndarray]] = {}
    for weights in multinomial_weights(len(table), resamples, seed):
        for name, values in metrics(weights @ table, weights @ shifted).items():
            drawn.setdefault(name, []).append(values)
    tail = (1 - LEVEL) / 2
    bounds: dict[str, tuple[float, float] | None] = {}
    for name, parts in drawn.items():
        values = np.concatenate(parts)
        defined = len(table) > 1 and bool(np.isfinite(values).all())
        low, high = np.quantile(values, [tail, 1 - tail]) if defined else (0.0, 0.0)
        bounds[name] = (float(low), float(high)) if defined else None
    return bounds


def multinomial_weights(groups: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each group is drawn in each resample, in blocks `[some, groups]` of bounded size."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _WEIGHTS_AT_ONCE // groups)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        yield generator.multinomial(groups, np.full(groups, 1 / groups), size=size).astype(np.float64)
