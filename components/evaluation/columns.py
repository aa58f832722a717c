"""A crosscoder is measured hook point by hook point: all are read, and one is replaced by what is written there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from components.evaluation.record import Metrics
from components.evaluation.results import Evaluation
from components.sae.coder import Coder
from components.sae.features import Features


class OneColumn:
    """A coder, of which one column of what it writes is used."""

    def __init__(self, coder: Coder, number: int) -> None:
        """number: of the column; -1 is the last."""
        number %= len(coder.writes)
        start = sum(column.width for column in coder.writes[:number])
        self._coder, self._here = coder, slice(start, start + coder.writes[number].width)
        self.W_dec, self.d_in, self.d_sae = coder.W_dec[:, self._here], coder.d_in, coder.d_sae

    def reconstruct(self, x: Tensor) -> tuple[Features, Tensor]:
        """`[n, d_in]` -> features, and what is written in this column."""
        features, y = self._coder.reconstruct(x)
        return features, y[:, self._here]


def together(by_column: Mapping[str, Evaluation]) -> Evaluation:
    """Each metric is the mean over the columns, and so are the bounds of its interval: as wide as if the errors of all columns
    were one. `breakdown.column` has a row for each; the rest is the last column's."""
    rows = [{"column": name, **found.metrics} for name, found in by_column.items()]
    last = list(by_column.values())[-1]
    metrics: Metrics = {}
    for name, value in last.metrics.items():
        values = [found.metrics[name] for found in by_column.values()]
        numbers = [number for number in values if number is not None]
        whole = isinstance(value, int) or len(numbers) < len(values)
        metrics[name] = value if whole else sum(numbers) / len(numbers)
    return Evaluation(
        metrics=metrics, breakdown={**last.breakdown, "column": rows}, baselines=last.baselines, features=last.features
    )
