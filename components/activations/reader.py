"""Read an activation dataset as batches of tensors: the same batches for the same seed, from any point on.

The stream is endless: epoch after epoch, each in another order. Row groups are taken in a random order and rows are
mixed again within a window of them (on disk they are one global permutation already). A position in the stream is one
number, the rows read so far.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from components import storage
from components.activations.manifest import Manifest
from components.activations.schema import DTYPES, bytes_from_rows

WINDOW_ROWS = 131_072


@dataclass(frozen=True, kw_only=True)
class ActivationReader:
    """Batches `[batch_size, d_in]` of one hook point, in the number format on disk."""

    url: str
    manifest: Manifest
    hook_point: str
    batch_size: int
    seed: int

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def _dtype(self) -> str:
        return self.manifest.column(self.hook_point).dtype

    @cached_property
    def _groups(self) -> list[tuple[int, int, int]]:
        """(shard, row group, rows) of every row group, from the shards' footers."""
        found = []
        for number, shard in enumerate(self.manifest.shards):
            filesystem, path = storage.resolve(storage.join(self.url, shard.name))
            metadata = pq.read_metadata(path, filesystem=filesystem)
            found += [(number, group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
        return found

    def batches(self, start: int = 0) -> Generator[Tensor]:
        """Batches from row `start` of the stream on, without end. The next window is read while this one is used."""
        epoch, skip = divmod(start, self.tokens)
        held: list[Tensor] = []
        with ThreadPoolExecutor(max_workers=1) as thread:
            windows = self._windows(epoch, skip)
            following = thread.submit(next, windows)
            while True:
                window = following.result()
                following = thread.submit(next, windows)
                held.append(window)
                rows = sum(map(len, held))
                if rows < self.batch_size:
                    continue
                joined = torch.cat(held) if len(held) > 1 else held[0]
                full = rows // self.batch_size * self.batch_size
                yield from joined[:full].split(self.batch_size)
                held = [joined[full:]] if full < rows else []

    def _windows(self, epoch: int, skip: int) -> Iterator[Tensor]:
        """Windows of mixed rows from row `skip` of `epoch` on."""
        while True:
            for number, window in enumerate(self._epoch_plan(epoch)):
                rows = sum(self._groups[group][2] for group in window)
                if skip >= rows:
                    skip -= rows
                    continue
                # In numpy on purpose: torch would start a second team of OpenMP threads for this thread, and with more
                # of them than cores every parallel region of the training thread waits in the kernel (measured: half
                # the speed of its matrix products on two cores).
                values = np.concatenate([self._read(group) for group in window])
                order = np.random.default_rng((self.seed, epoch, number)).permutation(rows)[skip:]
                yield torch.from_numpy(values[order]).view(DTYPES[self._dtype])
                skip = 0
            epoch += 1

    def _epoch_plan(self, epoch: int) -> list[list[int]]:
        """The epoch's row groups in random order, cut into windows of about `WINDOW_ROWS` rows."""
        plan: list[list[int]] = [[]]
        rows = 0
        for group in np.random.default_rng((self.seed, epoch)).permutation(len(self._groups)).tolist():
            if rows >= WINDOW_ROWS:
                plan.append([])
                rows = 0
            plan[-1].append(group)
            rows += self._groups[group][2]
        return plan

    def _read(self, group: int) -> np.ndarray:
        """A row group's activations as bytes, `[rows, d_in * itemsize]`."""
        shard, row_group, _ = self._groups[group]
        filesystem, path = storage.resolve(storage.join(self.url, self.manifest.shards[shard].name))
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            table = file.read_row_group(row_group, columns=[self.hook_point])
        return bytes_from_rows(table[self.hook_point])
