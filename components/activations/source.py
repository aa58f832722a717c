"""What a trainer reads: a source of activations. The dataset reader is one."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Protocol

from torch import Tensor


class ColumnStatistics(Protocol):
    """Of one column, over all tokens of the source."""

    @property
    def d_in(self) -> int: ...

    @property
    def dtype(self) -> str:
        """Number format of the batches."""

    @property
    def mean(self) -> tuple[float, ...]:
        """`[d_in]`"""

    @property
    def mean_squared_norm(self) -> float:
        """Mean of `||x||^2`."""

    @property
    def median_norm(self) -> float: ...

    @property
    def scale(self) -> float:
        """The scalar that makes the mean of `||x||^2` equal to `d_in`."""


class ActivationSource(Protocol):
    """Aligned rows of several columns, deterministic in seed and position, resumable at any row."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def batch_size(self) -> int:
        """Rows of a batch of all ranks together."""

    @property
    def statistics(self) -> Mapping[str, ColumnStatistics]:
        """By column, of those that are activations."""

    def batches(self, start: int = 0, rank: int = 0, ranks: int = 1) -> Generator[dict[str, Tensor]]:
        """Batches without end from row `start` on, each rank its slice: the same batches for any number of ranks."""
