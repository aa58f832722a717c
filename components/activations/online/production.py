"""Make generations ahead of the training that reads them, as far as the disk allows, and delete those that it has behind it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from components import storage
from components.activations.dataset.extraction import extract
from components.activations.dataset.job import Extraction
from components.activations.dataset.manifest import read_manifest
from components.activations.online.folder import OnlineFolder, Wanted
from components.activations.online.space import Space, generation_space, require_space
from components.corpus.manifest import TokenSplit
from components.settings import UserError

logger = logging.getLogger(__name__)


SHARDS_AT_ONCE = 2
"""Of the tokens, that are kept while they are read."""
PIECES = 64
"""Of a generation, where tokens have more shards than that: each is a shard to be read."""


@dataclass(frozen=True)
class Cut:
    """How the sequences of a split are cut into generations: in `pieces` times `count` parts of about the same size, of which
    each generation has every `count`-th, so that it is a sample of the whole corpus."""

    sequences: int
    count: int
    pieces: int

    def generation(self, number: int) -> list[tuple[int, int]]:
        """First sequence and the one after the last, of each piece that is not empty."""
        parts = self.pieces * self.count
        edges = [
            (self.sequences * part // parts, self.sequences * (part + 1) // parts) for part in range(number, parts, self.count)
        ]
        return [(first, stop) for first, stop in edges if first < stop]

    @cached_property
    def largest(self) -> int:
        """Sequences of the largest one."""
        return max(sum(stop - first for first, stop in self.generation(number)) for number in range(self.count))


def cut(split: TokenSplit, context_length: int, generation_tokens: int) -> Cut:
    """The fewest generations of which none is larger."""
    most = max(1, generation_tokens // context_length)
    pieces = most if len(split.shards) <= SHARDS_AT_ONCE else min(most, PIECES)
    found = Cut(split.sequences, -(-split.sequences // most), pieces)
    while found.largest > most:
        found = replace(found, count=found.count + 1)
    return found


@dataclass(frozen=True)
class Production:
    """Generations in the making."""

    folder: OnlineFolder
    work: Callable[[int], Extraction]
    """What there is to do for a generation, by its number."""
    count: int
    space: Space
    """Of the largest one."""
    disk_bytes: int
    device: torch.device

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Until the last generation that is wanted is there. Whatever is killed on the way goes on where it was.

        At any moment, all generations together take `disk_bytes` at most.
        """
        pause = 0.05 if storage.is_local(self.folder.url) else 0.5
        following: int | None = None
        while not should_stop():
            wanted = self.folder.wanted()
            assert wanted is not None, "who starts this says what is wanted"
            following = max(wanted.first, following or 0)
            if self._ended(wanted, following):
                return
            number, kept = following % self.count, {place % self.count for place in range(wanted.first, following)}
            if number in kept:  # there are so few that all of them stay
                following += 1
                continue
            there = read_manifest(self.folder.generation_url(number)) is not None
            if not there:
                for other in set(self.folder.present()) - kept - {number}:
                    self.folder.delete(other)
            if there or len(kept) * self.space.kept + self.space.making <= self.disk_bytes:
                self.make(number)
                following += 1
            elif not kept:
                raise UserError(
                    f"activations.disk_bytes: {self.disk_bytes:,} do not hold one generation, which takes "
                    f"{self.space.making:,} while it is shuffled"
                )
            else:
                time.sleep(pause)

    def make(self, number: int) -> None:
        """One generation, or what is left of it to do."""
        work, started = self.work(number), time.monotonic()
        whole = not storage.exists(work.url)
        for url in (work.url, work.scatter_url):
            storage.sweep(url)  # what a killed process has left counts as well
        logger.info("extract: generation %d of %d", number + 1, self.count)
        manifest = extract(work, self.device)
        difference = self.folder.enter(number, manifest, time.monotonic() - started if whole else None)
        if difference is not None:
            logger.warning("extract: %s", difference)

    def _ended(self, wanted: Wanted, place: int) -> bool:
        """Whether the training ends before this place of the stream."""
        known = 0
        for stretch in self.folder.stretches():
            if stretch.before >= wanted.rows:
                return True
            if stretch.parts[-1].place == place:
                return False
            known = stretch.end
        return known >= wanted.rows


def production(folder: OnlineFolder, work: Callable[[int], Extraction], whole: Extraction, device: torch.device) -> Production:
    """whole: all generations together."""
    settings = whole.settings
    assert settings.generation_tokens is not None
    assert settings.disk_bytes is not None
    context = whole.token_manifest.context_length
    found = cut(whole.split, context, settings.generation_tokens)
    require_space(settings, whole.layout, found.largest, context, found.count)
    space = generation_space(settings, whole.layout, found.largest, context)
    return Production(folder, work, found.count, space, settings.disk_bytes, device)
