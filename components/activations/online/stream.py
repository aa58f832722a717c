"""The order in which generations are read: `mixed` of them side by side, so that a batch is of more text than one holds.

A place is read in `mixed` equal portions, of which stretch `s` of a pass over the corpus has the first of place `s`, the second
of the place before, and so on; what is left at the end of the pass is its last stretch. So each row is in each pass once, and a
stretch needs `mixed` places. With one it is a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Part:
    """Rows of a place, from `first` on until before `stop`."""

    place: int
    first: int
    stop: int
    ends: bool
    """Whether they are its last."""

    @property
    def rows(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class Stretch:
    before: int
    """Rows of the stream before it."""
    parts: tuple[Part, ...]
    """By place."""

    @property
    def end(self) -> int:
        return self.before + sum(part.rows for part in self.parts)


def portions(generations: int, mixed: int) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """(place, first portion, the one after the last) of each stretch, by place, without end."""
    mixed = min(mixed, generations)
    for begin in count(step=generations):
        for newest in range(generations):
            yield tuple(
                (begin + place, newest - place, newest - place + 1) for place in range(max(0, newest - mixed + 1), newest + 1)
            )
        if mixed > 1:
            yield tuple((begin + place, generations - place, mixed) for place in range(generations - mixed + 1, generations))


def stretches(generations: int, mixed: int, rows_of: Callable[[int], int | None]) -> Iterator[Stretch]:
    """rows_of: of a generation, by its number; None ends it."""
    before, mixed = 0, min(mixed, generations)
    for some in portions(generations, mixed):
        parts = []
        for place, first, stop in some:
            rows = rows_of(place % generations)
            if rows is None:
                return
            parts.append(Part(place, rows * first // mixed, rows * stop // mixed, stop == mixed))
        stretch = Stretch(before, tuple(parts))
        yield stretch
        before = stretch.end
