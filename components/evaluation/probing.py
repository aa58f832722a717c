"""k-sparse probing: how well a label is told from k features alone, against probes that read everything and features by chance.

Gurnee et al. 2023 (arXiv 2305.01610), as SAEBench does it: a passage is the mean of its tokens' activations or features; for
each label a logistic regression tells its passages from the others; the k features are those whose means differ most between
the two among training passages. Ours besides: every feature is divided by its standard deviation before it is fitted, so that
the penalty means the same for features of any scale; documents are dealt into folds, so that each is tested once, by probes
that have seen none of it; and balanced accuracy (mean of both sides' shares, 0.5 by chance) in place of discarding passages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from components.evaluation.intervals import LEVEL, RESAMPLES, SEED, multinomial_weights
from components.evaluation.record import Metrics, Row
from components.evaluation.settings import ProbingSettings

DENSE = "dense"
RANDOM_FEATURES = "random_features"
_DRAWS = 3
"""Of features by chance, for each label and fold; their mean counts."""


@dataclass(frozen=True, kw_only=True)
class Passages:
    """n passages: what a probe may read, and what they are."""

    values: Mapping[str, np.ndarray]
    """By name, each float32 `[n, width]`: `sae`, `coordinates` (of the activations) and `random_directions`."""
    labels: np.ndarray
    """Index into `names`, `[n]`."""
    documents: np.ndarray
    """`[n]`, from 0 on without a gap."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Predictions:
    """Of every passage by probes that did not see its document."""

    right: dict[str, np.ndarray]
    """By probe: whether each label was told rightly, or the share of draws, `[n, labels]`."""


def probe(task: str, passages: Passages, settings: ProbingSettings) -> tuple[Metrics, list[Row]]:
    """Balanced accuracy, mean over labels, of every kind of probe with its 95% interval over documents, named
    `<task>/<kind>_<k>`; and a row for each label."""
    # Of two labels, one being told from the other is the other being told from the one.
    tested = tuple(range(len(passages.names))) if len(passages.names) > 2 else (0,)
    folds = fold_of(passages, settings.folds)
    right = _predictions(passages, settings, tested, folds).right
    sums = _DocumentSums(passages, tested, right)
    whole = sums.accuracies(np.ones((1, sums.documents)))
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in right}
    for weights in _resampled(passages):
        for name, values in sums.accuracies(weights).items():
            drawn[name].append(values.mean(axis=1))
    metrics: Metrics = {}
    for name, values in whole.items():
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(np.concatenate(drawn[name]), [tail, 1 - tail])
        metrics |= {f"{task}/{name}": float(values.mean())}
        metrics |= {f"{task}/{name}_low": float(low), f"{task}/{name}_high": float(high)}
    metrics |= {f"{task}/labels": len(passages.names), f"{task}/documents": sums.documents}
    metrics |= {f"{task}/passages": len(passages.labels)}
    rows: list[Row] = []
    for column, label in enumerate(tested):
        mine = passages.labels == label
        counts = {"documents": len(np.unique(passages.documents[mine])), "passages": int(mine.sum())}
        found = {name: float(values[0, column]) for name, values in whole.items()}
        rows.append({"task": task, "label": passages.names[label], **counts, **found})
    return metrics, rows


def dealt(keys: Sequence[str], parts: int) -> np.ndarray:
    """The part of each of these names, equally many in each: decided by a hash, so that it does not depend on their order."""
    order = sorted(range(len(keys)), key=lambda place: blake2b(keys[place].encode(), digest_size=8).digest())
    parted = np.empty(len(keys), dtype=np.int64)
    parted[order] = np.arange(len(keys)) % parts
    return parted


def strata(passages: Passages) -> list[np.ndarray]:
    """Documents with the same labels, as arrays of their numbers: what is dealt and drawn within, so that no label is lost."""
    held: dict[int, set[int]] = {}
    for document, label in zip(passages.documents.tolist(), passages.labels.tolist(), strict=True):
        held.setdefault(document, set()).add(label)
    groups: dict[tuple[int, ...], list[int]] = {}
    for document in sorted(held):
        groups.setdefault(tuple(sorted(held[document])), []).append(document)
    return [np.array(members) for members in groups.values()]


def chosen(values: np.ndarray, positive: np.ndarray, k: int) -> np.ndarray:
    """The k columns of `values` `[n, width]` whose means differ most between the positive rows (bool `[n]`) and the others."""
    difference = np.abs(values[positive].mean(axis=0, dtype=np.float64) - values[~positive].mean(axis=0, dtype=np.float64))
    return np.argsort(-difference, kind="stable")[:k]


def fold_of(passages: Passages, parts: int) -> np.ndarray:
    """Of each passage: that of its document."""
    fold, before = np.empty(int(passages.documents.max()) + 1, dtype=np.int64), 0
    for members in strata(passages):
        fold[members] = (before + dealt([str(member) for member in members.tolist()], parts)) % parts
        before += len(members)
    return fold[passages.documents]


def _predictions(passages: Passages, settings: ProbingSettings, tested: Sequence[int], folds: np.ndarray) -> _Predictions:
    shape = (len(passages.labels), len(tested))
    right: dict[str, np.ndarray] = {}
    generator = np.random.default_rng(SEED)
    for part in range(settings.folds):
        train, test = folds != part, folds == part
        for column, label in enumerate(tested):
            positive = passages.labels == label
            for name, columns, values in _probes(passages, settings, train, positive, generator):
                told = _told(values[np.ix_(train, columns)], positive[train], values[np.ix_(test, columns)])
                share = right.setdefault(name, np.zeros(shape))
                share[test, column] += (told == positive[test]) / (_DRAWS if name.startswith(RANDOM_FEATURES) else 1)
    return _Predictions(right)


def _probes(
    passages: Passages, settings: ProbingSettings, train: np.ndarray, positive: np.ndarray, generator: np.random.Generator
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, columns and values of each probe for one label and one fold; what it reads is decided by training passages."""
    x, features = passages.values["coordinates"], passages.values["sae"]
    yield DENSE, np.arange(x.shape[1]), x
    most = max(settings.k)
    for kind, values in passages.values.items():
        best = chosen(values[train], positive[train], most)
        for k in settings.k:
            yield f"{kind}_{k}", best[:k], values
    living = np.flatnonzero((features[train] > 0).any(axis=0))
    for k in settings.k:
        for _ in range(_DRAWS):
            drawn = generator.choice(living, size=min(k, len(living)), replace=False) if len(living) else np.arange(1)
            yield f"{RANDOM_FEATURES}_{k}", drawn, features


def _told(train: np.ndarray, positive: np.ndarray, test: np.ndarray) -> np.ndarray:
    """What a logistic regression fitted on train `[n, k]` and positive (bool `[n]`) says of test `[m, k]`."""
    from sklearn.linear_model import LogisticRegression

    if positive.all() or not positive.any():  # all of one label in one fold
        return np.full(len(test), bool(positive.all()))
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, spread = train.mean(axis=0), train.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    fitted = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1_000).fit((train - mean) / spread, positive)
    return np.asarray(fitted.predict((test - mean) / spread), dtype=bool)


class _DocumentSums:
    """Per document and label: passages of it and of others, and how many of both each probe told rightly."""

    def __init__(self, passages: Passages, tested: Sequence[int], right: Mapping[str, np.ndarray]) -> None:
        self.documents = int(passages.documents.max()) + 1
        own = passages.labels[:, None] == np.array(tested)[None]
        self._sides = (own, ~own)
        self._of = passages.documents
        self._counts = [self._summed(side) for side in self._sides]
        self._right = {name: [self._summed(side * share) for side in self._sides] for name, share in right.items()}

    def accuracies(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Balanced accuracy by probe, `[resamples, labels]`; weights `[resamples, documents]`: how often each counts."""
        counts = [weights @ count for count in self._counts]
        return {
            name: sum(weights @ side / count for side, count in zip(sides, counts, strict=True)) / 2
            for name, sides in self._right.items()
        }

    def _summed(self, values: np.ndarray) -> np.ndarray:
        summed = np.zeros((self.documents, values.shape[1]))
        np.add.at(summed, self._of, values)
        return summed


def _resampled(passages: Passages) -> Iterator[np.ndarray]:
    """How often each document is drawn, `[some, documents]`: as many as there are with the same labels, so that every label
    is in every resample."""
    groups = strata(passages)
    documents = int(passages.documents.max()) + 1
    weights = np.zeros((RESAMPLES, documents))
    for number, members in enumerate(groups):
        weights[:, members] = np.concatenate(list(multinomial_weights(len(members), RESAMPLES, SEED + number)))
    yield weights
