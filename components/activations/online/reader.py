"""Read generations one after the other, as one stream: the same rows in the same order, whenever each of them was made."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from components.activations.dataset.manifest import Manifest, read_manifest
from components.activations.dataset.reader import WINDOW_GROUPS, ActivationReader
from components.activations.dataset.source import Source
from components.activations.online.folder import OnlineFolder
from components.activations.online.stream import Stretch, stretches
from components.storage.cache import DiskCache


@dataclass(kw_only=True)
class GenerationReader(Source):
    """Batches of generations, mixed as `stream` says: pass `e` over the corpus is epoch `e` of each of them.

    One that is not there yet is waited for. Memory: that of an `ActivationReader`, and two windows where several are mixed.
    """

    folder: OnlineFolder
    manifest: Manifest
    """Of the first generation."""
    columns: tuple[str, ...]
    batch_size: int
    parts: int = 1
    seed: int
    device: torch.device | None = None
    cache: DiskCache | None = None
    leads: bool = True
    """Whether it speaks for all processes that read: says what is needed, and hears why no more is made."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked again and again while it waits; a WaitEnded is raised where it says yes."""
    _kept: dict[int, int] = field(default_factory=dict)
    """Of the places that were begun and may still be asked for, the row after their last."""
    _begun: tuple[float, int] | None = None
    """When the first row was there, and which."""
    _waited: float = 0.0
    """Seconds since then without data."""

    @property
    def first(self) -> ActivationReader:
        """The first generation, over and over."""
        return self._reader(0)

    def windows(self, start: int) -> Generator[tuple[dict[str, Tensor], int]]:
        count, mixed, _ = self._known(0)
        streams: dict[int, _Rows] = {}
        try:
            for stretch in stretches(count, mixed, lambda number: self._known(number)[2]):
                if start >= stretch.end:
                    continue
                if count > 1:  # a single one stays
                    self._kept |= {part.place: stretch.end for part in stretch.parts if part.ends}
                chunks = _chunks(stretch, self.manifest.rows_per_group * WINDOW_GROUPS)
                for number, (first, stop) in enumerate(pairwise(chunks)):
                    before, end = stretch.before + sum(first), stretch.before + sum(stop)
                    if start >= end:
                        continue
                    for part, begin in zip(stretch.parts, first, strict=True):
                        if part.place not in streams:
                            streams[part.place] = self._rows(part.place, part.first + begin, count, min(mixed, count))
                    self._begun = self._begun or (time.monotonic(), start)
                    pieces = [
                        piece
                        for part, begin, following in zip(stretch.parts, first, stop, strict=True)
                        for piece in streams[part.place].take(following - begin)
                    ]
                    if len(stretch.parts) > 1:
                        mixing = np.random.default_rng((self.seed, 1, stretch.before, number))
                        pieces = [(_mixed(pieces, end - before, mixing, self.device), end - before)]
                    for piece, rows in pieces:
                        skipped, before = max(0, start - before), before + rows
                        if skipped < rows:
                            yield {name: values[skipped:] for name, values in piece.items()}, rows - skipped
                    start = end
                for part in stretch.parts:
                    if part.ends:
                        streams.pop(part.place).windows.close()
        finally:
            for stream in streams.values():
                stream.windows.close()

    def behind(self, row: int) -> int | None:
        return max((end for end in self._kept.values() if end <= row), default=None)

    def release(self, row: int) -> None:
        ended = [place for place, end in self._kept.items() if end <= row]
        for place in ended:
            del self._kept[place]
        wanted = self.folder.wanted() if self.leads and ended else None
        if wanted is not None and self._begun is not None:
            began, begin = self._begun
            seconds = time.monotonic() - began
            measured = {"tokens_per_second": (row - begin) / (seconds - self._waited), "waited": self._waited / seconds}
            self.folder.want(wanted.model_copy(update={"first": max(ended) + 1, **measured}))

    def _known(self, number: int) -> tuple[int, int, int]:
        """How many generations there are, how many are mixed, and the rows of this one."""

        def known() -> bool:
            ledger = self.folder.ledger()
            return ledger is not None and number < len(ledger.entries)

        self._wait(known)
        ledger = self.folder.ledger()
        assert ledger is not None
        return ledger.generations, ledger.mixed, ledger.entries[number].rows

    def _wait(self, found: Callable[[], object]) -> None:
        since = time.monotonic()
        self.folder.waited_for(found, self.should_stop, self.leads)
        self._waited += time.monotonic() - since if self._begun else 0.0

    def _rows(self, place: int, first: int, count: int, mixed: int) -> _Rows:
        """Of a place, from its row `first` on."""
        epoch, number = divmod(place, count)
        reader = self._reader(number, mixed)
        return _Rows(reader.windows(epoch * reader.tokens + first, to_epochs_end=True))

    def _reader(self, number: int, mixed: int = 1) -> ActivationReader:
        """Of several that are mixed each has its part of the memory of one."""
        url = self.folder.generation_url(number)
        self._wait(lambda: read_manifest(url))
        manifest = read_manifest(url)
        assert manifest is not None
        return ActivationReader(
            url=url, manifest=manifest, columns=self.columns, batch_size=self.batch_size, seed=self.seed, device=self.device,
            cache=self.cache, window_groups=max(1, WINDOW_GROUPS // mixed), threads=None if mixed == 1 else 1,
        )  # fmt: skip


@dataclass
class _Rows:
    """So many rows of a place as are wanted, one after the other."""

    windows: Generator[tuple[dict[str, Tensor], int]]
    held: dict[str, Tensor] = field(default_factory=dict)
    length: int = 0

    def take(self, rows: int) -> Iterator[tuple[dict[str, Tensor], int]]:
        while rows:
            if not self.length:
                self.held, self.length = next(self.windows)
            some = min(rows, self.length)
            yield {name: values[:some] for name, values in self.held.items()}, some
            self.held, self.length = {name: values[some:] for name, values in self.held.items()}, self.length - some
            rows -= some


def _chunks(stretch: Stretch, most: int) -> list[list[int]]:
    """The stretch in chunks of at most about so many rows, with the same share of each part: how far in each part they begin,
    and where the last one ends."""
    count = max(1, -(-(stretch.end - stretch.before) // most))
    return [[part.rows * chunk // count for part in stretch.parts] for chunk in range(count + 1)]


def _mixed(
    pieces: list[tuple[dict[str, Tensor], int]], rows: int, mixing: np.random.Generator, device: torch.device | None
) -> dict[str, Tensor]:
    """The rows of all pieces in one random order, in memory from which copies to a GPU do not wait."""
    places, pinned = torch.from_numpy(mixing.permutation(rows)), device is not None and device.type == "cuda"
    mixed = {
        name: torch.empty((rows, *values.shape[1:]), dtype=values.dtype, pin_memory=pinned)
        for name, values in pieces[0][0].items()
    }
    first = 0
    for piece, length in pieces:
        for name, values in piece.items():
            mixed[name].index_copy_(0, places[first : first + length], values)
        first += length
    return mixed
