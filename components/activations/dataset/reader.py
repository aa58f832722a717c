"""Read an activation dataset as batches of tensors: the same batches for the same seed, from any point on.

The stream is endless: epoch after epoch, each in another order. On disk the rows are one global random permutation
already. An epoch takes the row groups in a random order, a window of them at a time, cuts each into short pieces of
neighbouring rows at a random phase, and mixes the pieces of the window. Every piece is read straight to where it belongs
in the batch, so that mixing costs no copy. A position in the stream is one number, the rows read so far.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components import storage
from components.activations.dataset.manifest import Manifest, Shard
from components.activations.dataset.schema import memory
from components.activations.dataset.source import Source
from components.activations.dataset.values import Values
from components.storage.cache import DiskCache

PIECE_ROWS = 128
WINDOW_GROUPS = 8
_WINDOWS_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class ActivationReader(Source):
    """Batches of some columns, aligned row by row, in the number format on disk.

    Memory: four windows. Neither `threads`, `device` nor `cache` changes what is read. The next windows are read while this
    one is used; each of several ranks reads every row group, of which a part has no checksum.
    """

    url: str
    manifest: Manifest
    columns: tuple[str, ...]
    batch_size: int
    parts: int = 1
    seed: int
    window_groups: int = WINDOW_GROUPS
    threads: int | None = None
    """That read; by default 2 from a local disk, where more only get in each other's way, and 8 from an object store."""
    device: torch.device | None = None
    """Where batches go; for a GPU they are read into page-locked memory, so that copies to it do not wait."""
    cache: DiskCache | None = None
    """Where row groups of a dataset on an object store are kept."""

    @property
    def first(self) -> ActivationReader:
        return self

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    def windows(self, start: int, to_epochs_end: bool = False) -> Generator[tuple[dict[str, Tensor], int]]:
        """Windows of mixed rows from row `start` on, read ahead of use; without end, or to that of the epoch of `start`."""
        buffers = _Buffers(min(self.window_groups * self.manifest.rows_per_group, self.tokens), self.device)
        values = Values(self.url, self.manifest, self.cache)
        plans = self._plans(start, to_epochs_end)
        readers = ThreadPoolExecutor(self.threads or (2 if storage.is_local(self.url) else 8), thread_name_prefix="activations")
        # A thread of its own for all that comes before reading: in the trainer's thread it would wait for the interpreter
        # lock at every window (measured: 2 to 9 ms).
        planner = ThreadPoolExecutor(1, thread_name_prefix="activations-plan", initializer=_go_to, initargs=(self.device,))

        def prepare() -> tuple[_Window, dict[str, np.ndarray], list[Future[None]], int] | None:
            plan, skip = next(plans, (None, 0))
            if plan is None:
                return None
            raw = {name: buffers.take(plan.rows, self.manifest.layout.column_bytes[name]) for name in self.columns}
            return plan, raw, list(self._read(readers, values, plan, raw)), skip

        try:
            coming = deque(planner.submit(prepare) for _ in range(_WINDOWS_AHEAD))
            while True:
                following = coming.popleft()
                coming.append(planner.submit(prepare))
                prepared = following.result()
                if prepared is None:
                    return
                yield self._ready(*prepared)
        finally:
            planner.shutdown(cancel_futures=True)
            readers.shutdown(cancel_futures=True)

    def _ready(
        self, plan: _Window, raw: dict[str, np.ndarray], reads: list[Future[None]], skip: int
    ) -> tuple[dict[str, Tensor], int]:
        for read in reads:
            read.result()
        layout = self.manifest.layout
        return {name: layout.tensor(name, raw[name])[skip:] for name in self.columns}, plan.rows - skip

    def _read(
        self, threads: ThreadPoolExecutor, values: Values, plan: _Window, raw: dict[str, np.ndarray]
    ) -> Iterator[Future[None]]:
        # In numpy on purpose: torch would start a second team of OpenMP threads for such a thread, and with more of them
        # than cores every parallel region of the training thread waits in the kernel (measured: half the speed of its
        # matrix products on two cores).
        for name, whole in raw.items():
            width = self.manifest.layout.column_bytes[name]
            raw_bytes = memory(whole)
            for (shard, group), pieces in zip(plan.groups, plan.pieces, strict=True):
                targets = [raw_bytes[first * width : stop * width] for first, stop in pieces]
                yield threads.submit(values.read_into, shard, group, name, targets)

    def _plans(self, start: int, to_epochs_end: bool) -> Iterator[tuple[_Window, int]]:
        """What each window holds, and how many of its rows to skip, from row `start` on."""
        epoch = 0
        while True:
            groups = self._epoch(epoch)
            rows = sum(rows for _, _, rows in groups)
            if start >= rows:
                start -= rows
            else:
                for number in range(0, len(groups), self.window_groups):
                    some = groups[number : number + self.window_groups]
                    rows = sum(rows for _, _, rows in some)
                    if start < rows:
                        mixing = np.random.default_rng((self.seed, epoch, 0, number))
                        yield _window(some, mixing), start
                        start = 0
                    else:
                        start -= rows
                if to_epochs_end:
                    return
            epoch += 1

    @cached_property
    def _groups(self) -> list[tuple[Shard, int, int]]:
        """(shard, row group, rows) of every row group."""
        return [
            (shard, group, rows) for shard in self.manifest.shards for group, rows in enumerate(self.manifest.group_rows(shard))
        ]

    def _epoch(self, epoch: int) -> list[tuple[Shard, int, int]]:
        """The row groups of an epoch, in its order."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._groups))
        return [self._groups[group] for group in order.tolist()]


@dataclass(frozen=True)
class _Window:
    """Row groups, and for each the rows of the window, (first, stop), that its pieces go to in turn."""

    groups: list[tuple[Shard, int]]
    pieces: list[list[tuple[int, int]]]
    rows: int


def _window(groups: list[tuple[Shard, int, int]], mixing: np.random.Generator) -> _Window:
    lengths, owners = [], []
    for owner, (_, _, rows) in enumerate(groups):
        phase = int(mixing.integers(1, PIECE_ROWS + 1))
        edges = [0, *range(phase, rows, PIECE_ROWS), rows]
        own = np.diff(edges)
        lengths.append(own)
        owners.append(np.full(len(own), owner))
    length, owner_of = np.concatenate(lengths), np.concatenate(owners)
    order = mixing.permutation(len(length))
    first = np.empty(len(length), dtype=np.int64)
    first[order] = np.cumsum(length[order]) - length[order]
    pieces: list[list[tuple[int, int]]] = [[] for _ in groups]
    for own, begin, rows in zip(owner_of.tolist(), first.tolist(), length.tolist(), strict=True):
        pieces[own].append((begin, begin + rows))
    return _Window([(shard, group) for shard, group, _ in groups], pieces, int(length.sum()))


def _go_to(device: torch.device | None) -> None:
    """Have what this thread asks of CUDA go to the GPU of the batches: the first one would give it memory for that."""
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


class _Buffers:
    """Memory for windows, used again when nobody holds a tensor on it any more: fresh pages cost a fault each."""

    def __init__(self, rows: int, device: torch.device | None) -> None:
        """rows: of the largest window. All are as large, so that any of them may hold any window."""
        self.rows = rows
        self.gpu = device if device is not None and device.type == "cuda" else None
        self._free: dict[int, list[tuple[np.ndarray, Any]]] = {}

    def take(self, rows: int, width: int) -> np.ndarray:
        """uint8 `[rows, width]`, of any content."""
        free = self._free.setdefault(width, [])
        if free:
            whole, copied = free.pop()
            if copied is not None:
                copied.synchronize()  # a copy to the GPU may still be reading it
        else:
            whole = torch.empty((self.rows, width), dtype=torch.uint8, pin_memory=self.gpu is not None).numpy()
        view = whole[:rows]
        # Tensors made of it hold `view`; when the last one is gone, so is it.
        weakref.finalize(view, self._give_back, width, whole).atexit = False
        return view

    def _give_back(self, width: int, whole: np.ndarray) -> None:
        copied = None
        if self.gpu is not None:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.gpu))  # the copies are queued there, whichever GPU is the current one
        self._free[width].append((whole, copied))
