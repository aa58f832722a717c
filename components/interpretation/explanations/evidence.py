"""What an explanation is made from and scored on: for chosen features, one more pass over the same held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.interpretation.activations import Batch, ByNumber, Pass
from components.interpretation.examples import Examples, lots
from components.interpretation.explanations.prompts import Excerpt

BEFORE, AFTER = 23, 8
"""Tokens of an excerpt beside the one that it is about."""
_CANDIDATES_PER_SCORED = 4


@dataclass(frozen=True)
class Evidence:
    """Of one feature. No excerpt to score on overlaps one that was shown."""

    feature: int
    largest: float
    shown: tuple[Excerpt, ...]
    """The strongest first."""
    firing: tuple[Excerpt, ...]
    silent: tuple[Excerpt, ...]


def gather(held_out: Pass, features: Sequence[int], shown: int, scored: int, decode: Callable[[int], str]) -> list[Evidence]:
    """Memory: what `Examples` keeps of so many features."""
    chosen = torch.tensor(features, device=held_out.device)
    length = held_out.text.manifest.context_length
    strongest, count = max(1, shown // 4), 2 * (shown + scored)
    examples = Examples(strongest, count, len(features), length, held_out.device, chosen)
    sequences = ByNumber(held_out.text, held_out.tokens)
    candidates, silent = _candidates(len(sequences), length, _CANDIDATES_PER_SCORED * scored), _Silent()
    for batch in held_out.batches():
        examples.add(batch.firings(chosen), batch.first, len(batch.block))
        silent.add(batch.activations(chosen), batch, candidates)

    def excerpt(sequence: int, place: int, along: np.ndarray | None) -> Excerpt:
        tokens, documents, _ = sequences.of(sequence)
        window = _window(place, int((documents >= 0).nonzero()[0].max()) + 1)
        values = np.zeros(len(tokens), np.float32) if along is None else along
        return Excerpt(tuple(decode(int(token)) for token in tokens[window]), tuple(float(value) for value in values[window]))

    kept, found = examples.found(), []
    for index, feature in enumerate(features):
        own, best = kept.drawn == index, kept.features == index
        numbers = kept.drawn_sequences[own]
        along = kept.along(kept.drawn[own], numbers)
        pool = list(zip(numbers.tolist(), kept.drawn_places[own].tolist(), along, strict=True))
        along = kept.along(kept.features[best], kept.sequences[best])
        top = list(zip(kept.sequences[best].tolist(), along.argmax(axis=1).tolist(), along, strict=True))
        # In the order of their lots, which is random, and half of them at most where there are few.
        teaching = _apart(top, shown // 4, [])
        teaching += _apart(pool, min(shown - len(teaching), max(1, len(pool) // 2)), teaching)
        testing = _apart(pool, scored, teaching)
        teaching.sort(key=lambda one: -one[2][one[1]])
        others = silent.of(index, feature, scored)
        found.append(
            Evidence(
                feature=feature,
                largest=max((float(one[2].max()) for one in teaching), default=0.0),
                shown=tuple(excerpt(*one) for one in teaching),
                firing=tuple(excerpt(*one) for one in testing),
                silent=tuple(excerpt(sequence, place, None) for sequence, place in others),
            )
        )
    return found


Place = tuple[int, int, np.ndarray]


def _apart(places: Sequence[Place], count: int, taken: Sequence[Place]) -> list[Place]:
    """The first `count` whose windows overlap none of `taken` and none of each other."""
    found: list[Place] = []
    for one in places:
        if len(found) >= count:
            break
        if all(one[0] != other[0] or abs(one[1] - other[1]) > BEFORE + AFTER for other in (*taken, *found)):
            found.append(one)
    return found


def _window(place: int, stop: int) -> slice:
    return slice(max(0, place - BEFORE), min(stop, place + AFTER + 1))


def _candidates(total: int, length: int, count: int) -> dict[int, int]:
    """Sequences, spread evenly over the text, and a place in each, drawn by its number."""
    numbers = sorted({place * total // count for place in range(count)}) if total else []
    drawn = lots(torch.tensor(numbers, dtype=torch.int64), torch.zeros(len(numbers), dtype=torch.int64), torch.tensor(-1))
    return dict(zip(numbers, (drawn % length).tolist(), strict=True))


class _Silent:
    """Which of the chosen features fire nowhere in the windows of candidates."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._quiet: list[Tensor] = []

    def add(self, activations: Tensor, batch: Batch, candidates: dict[int, int]) -> None:
        for row, number in enumerate(batch.numbers.tolist()):
            counted = np.flatnonzero(batch.block.documents[row] >= 0)
            if number not in candidates or len(counted) == 0:
                continue
            place = min(candidates[number], int(counted[-1]))
            window = _window(place, int(counted[-1]) + 1)
            self._places.append((number, place))
            self._quiet.append((activations[row, window] == 0).all(dim=0).cpu())

    def of(self, index: int, feature: int, count: int) -> list[tuple[int, int]]:
        """Other features begin elsewhere in the list, so that not all are scored on the same text."""
        quiet = [place for place, silent in zip(self._places, self._quiet, strict=True) if bool(silent[index])]
        begin = feature * 7919 % max(1, len(quiet))
        return (quiet[begin:] + quiet[:begin])[:count]
