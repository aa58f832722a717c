"""What a trainer reads: aligned rows of some columns, batch by batch, the same whenever and by how many they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor

from components.activations.dataset.manifest import Manifest


class Source(ABC):
    """A stream of rows without end. A position in it is one number, the rows before it."""

    columns: tuple[str, ...]
    """Hook points, and `document`, `position` or `token` where they are wanted."""
    batch_size: int
    manifest: Manifest
    """Whose columns, means and scales hold for all of it."""
    parts: int = 1
    """Equal parts that a trainer takes a batch in, one after the other."""

    @property
    @abstractmethod
    def first(self) -> Source:
        """What the stream begins with, over and over: all of it where it is one dataset."""

    @abstractmethod
    def windows(self, start: int) -> Generator[tuple[dict[str, Tensor], int]]:
        """The rows from `start` on in pieces of any length, each with its length."""

    def batches(self, start: int = 0, rank: int = 0, ranks: int = 1) -> Generator[dict[str, Tensor]]:
        """Batches from row `start` of the stream on, without end; `[batch_size, d_in]` for a hook point.

        With `ranks`, each `rank` gets its slice of every part of every batch, `[batch_size / ranks, d_in]`: the parts of all
        side by side are those of one, and `start` counts the rows of all. Raises a DamagedDatasetError that names the shard
        where one is not what the manifest says.
        """
        for column in self.columns:
            if column not in self.manifest.layout.column_bytes:
                self.manifest.column(column)  # says which there are
        if self.batch_size % (self.parts * ranks) or not 0 <= rank < ranks:
            raise ValueError(f"{self.parts} parts of {self.batch_size} rows have no equal slice for rank {rank} of {ranks}")
        with closing(self._batches(start)) as batches:
            for batch in batches:
                yield batch if ranks == 1 else {name: self._slice(rows, rank, ranks) for name, rows in batch.items()}

    def _slice(self, rows: Tensor, rank: int, ranks: int) -> Tensor:
        """What a rank gets of a batch `[batch_size, ...]`; from several parts a copy, from which copies to a GPU wait as little
        as from the rows."""
        parts = rows.unflatten(0, (self.parts, ranks, -1))[:, rank]
        if self.parts == 1:
            return parts[0]
        found = torch.empty(parts.shape, dtype=parts.dtype, pin_memory=rows.is_pinned())
        return found.copy_(parts).flatten(0, 1)

    def _batches(self, start: int) -> Generator[dict[str, Tensor]]:
        held: dict[str, Tensor] = {}
        rows_held = 0
        with closing(self.windows(start)) as windows:
            for window, rows in windows:
                first = 0
                if held:
                    first = min(self.batch_size - rows_held, rows)
                    held = {name: torch.cat([held[name], window[name][:first]]) for name in self.columns}
                    rows_held += first
                    if rows_held == self.batch_size:
                        yield held
                        held, rows_held = {}, 0
                while first + self.batch_size <= rows:
                    yield {name: window[name][first : first + self.batch_size] for name in self.columns}
                    first += self.batch_size
                if first < rows:
                    held, rows_held = {name: window[name][first:].clone() for name in self.columns}, rows - first

    def behind(self, row: int) -> int | None:
        """Where the newest part ends that lies before `row` and is still kept: a checkpoint from there on lets it go. None
        where nothing is ever let go."""
        return None

    def release(self, row: int) -> None:
        """No row before this one will be asked for again; called where `behind` says that something is kept for that."""
        raise NotImplementedError
