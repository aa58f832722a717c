"""Read generations one after the other, as one stream: the same rows in the same order, whenever each of them was made."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.activations.dataset.manifest import Manifest, read_manifest
from components.activations.dataset.reader import ActivationReader
from components.activations.dataset.source import Source
from components.activations.online.folder import OnlineFolder
from components.storage.cache import DiskCache


@dataclass(kw_only=True)
class GenerationReader(Source):
    """Batches of generations: epoch `e` of the stream is epoch `e` of each of them in turn.

    One that is not there yet is waited for. Memory: that of an `ActivationReader`.
    """

    folder: OnlineFolder
    manifest: Manifest
    """Of the first generation."""
    columns: tuple[str, ...]
    batch_size: int
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
        place = before = 0
        while True:
            count, rows = self._entry(place)
            if start < before + rows:
                if count > 1:  # a single one stays
                    self._kept[place] = before + rows
                epoch, number = divmod(place, count)
                reader = self._reader(number)
                self._begun = self._begun or (time.monotonic(), start)
                with closing(reader.windows(epoch * rows + start - before, to_epochs_end=True)) as windows:
                    yield from windows
                start = before + rows
            place, before = place + 1, before + rows

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

    def _entry(self, place: int) -> tuple[int, int]:
        """How many generations there are, and the rows of the one at a place."""

        def known() -> bool:
            ledger = self.folder.ledger()
            return ledger is not None and place % ledger.generations < len(ledger.entries)

        self._wait(known)
        ledger = self.folder.ledger()
        assert ledger is not None
        return ledger.generations, ledger.entries[place % ledger.generations].rows

    def _wait(self, found: Callable[[], object]) -> None:
        since = time.monotonic()
        self.folder.waited_for(found, self.should_stop, self.leads)
        self._waited += time.monotonic() - since if self._begun else 0.0

    def _reader(self, number: int) -> ActivationReader:
        url = self.folder.generation_url(number)
        self._wait(lambda: read_manifest(url))
        manifest = read_manifest(url)
        assert manifest is not None
        return ActivationReader(
            url=url, manifest=manifest, columns=self.columns, batch_size=self.batch_size, seed=self.seed, device=self.device,
            cache=self.cache,
        )  # fmt: skip
