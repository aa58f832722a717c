"""Where each feature fires most, a uniform sample of the tokens on which it fires, and a histogram: one pass, bounded memory.

What is kept is the same however the text is cut into batches and spans, and in whatever order the spans are put together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS_PER_OCTAVE = 4
_OCTAVES = range(-24, 16)
_MANTISSA_BITS, _BIAS = 23, 127  # of float32
_BIN_SHIFT = _MANTISSA_BITS - (BINS_PER_OCTAVE.bit_length() - 1)
_FIRST_BIN = (_OCTAVES.start + _BIAS) * BINS_PER_OCTAVE
BINS = len(_OCTAVES) * BINS_PER_OCTAVE

_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The odd constants of splitmix64 (Steele, Lea & Flood 2014), as signed numbers."""


@dataclass
class Kept:
    """For each feature the `count` sequences of highest score; of equal ones, those that came first. Places are
    `[count, d_sae]`, a score of 0 is an empty place."""

    scores: Tensor
    sequences: Tensor
    """int64; numbers of sequences."""
    activations: Tensor
    """Of the feature along that sequence, float32 `[count, d_sae, length]`."""

    @classmethod
    def nothing(cls, count: int, d_sae: int, length: int, device: torch.device) -> Kept:
        return cls(
            torch.zeros(count, d_sae, dtype=torch.float64, device=device),
            torch.full((count, d_sae), -1, dtype=torch.int64, device=device),
            torch.zeros(count, d_sae, length, device=device),
        )

    def add(self, scores: Tensor, sequences: Tensor, activations: Tensor) -> None:
        """scores `[b, d_sae]` of b sequences with these numbers `[b]`; activations `[b, d_sae, length]`."""
        self.add_each(scores, sequences[:, None].expand(-1, scores.shape[1]), activations)

    def add_each(self, scores: Tensor, sequences: Tensor, activations: Tensor) -> None:
        """The same where each feature has sequences of its own, `[b, d_sae]`."""
        count = len(self.scores)
        every = torch.cat([self.scores, scores])
        order = every.sort(dim=0, descending=True, stable=True).indices[:count]
        if bool((order < count).all()):
            return
        self.scores = every.gather(0, order)
        self.sequences = torch.cat([self.sequences, sequences]).gather(0, order)
        places = order[:, :, None].expand(-1, -1, activations.shape[2])
        self.activations = torch.cat([self.activations, activations]).gather(0, places)


class Drawn:
    """For each feature the `count` tokens of highest lot, of those on which it fires."""

    def __init__(self, count: int, d_sae: int, length: int, device: torch.device) -> None:
        self._count, self._known = count, torch.zeros(0, 5, dtype=torch.int64, device=device)
        # What is kept of a feature along a sequence has a row of its own: none moves when others come and go.
        self._rows = torch.zeros(d_sae * count, length, device=device)
        self.least = torch.full((d_sae,), -1, dtype=torch.int64, device=device)
        """Lot that another token must exceed, `[d_sae]`."""

    def add(self, lots: Tensor, features: Tensor, sequences: Tensor, places: Tensor, activations: Tensor) -> None:
        """lots, features, numbers of sequences and places in them, int64 `[m]`, in any order; activations of the features along
        those sequences `[m, length]`."""
        if len(lots) == 0:
            return
        arrived = torch.stack([features, lots, sequences, places, torch.arange(len(lots), device=lots.device)], dim=1)
        touched = torch.zeros(len(self.least), dtype=torch.bool, device=lots.device)
        touched[features] = True
        concerned = touched[self._known[:, 0]]
        several, stay = torch.cat([self._known[concerned], arrived]), self._known[~concerned]
        is_new = torch.arange(len(several), device=lots.device) >= len(several) - len(arrived)
        order = _by_feature_and_lot(several)
        several, is_new = several[order], is_new[order]
        starts = torch.searchsorted(several[:, 0].contiguous(), torch.arange(len(self.least) + 1, device=lots.device))
        rank = torch.arange(len(several), device=lots.device) - starts[several[:, 0]]
        last = several[rank == self._count - 1]
        self.least[last[:, 0]] = last[:, 1]
        kept, is_new = several[rank < self._count], is_new[rank < self._count]
        taken = torch.zeros(len(self._rows), dtype=torch.bool, device=lots.device)
        taken[torch.cat([stay[:, 4], kept[~is_new, 4]])] = True
        free = (~taken).nonzero()[: int(is_new.sum()), 0]
        self._rows[free] = activations[kept[is_new, 4]]
        kept[is_new, 4] = free
        self._known = torch.cat([stay, kept])

    def include(self, other: Drawn) -> None:
        """Those of other tokens."""
        features, lots, sequences, places, rows = other._known.T
        self.add(lots, features, sequences, places, other._rows[rows])

    def found(self) -> Tokens:
        features, _, sequences, places, rows = self._known[_by_feature_and_lot(self._known)].T
        return Tokens(features.contiguous(), sequences, places, self._rows[rows])


@dataclass(frozen=True)
class Tokens:
    """In the order of features, and then of falling lots."""

    features: Tensor
    """int64 `[m]`, as are the numbers of their sequences, and places in them."""
    sequences: Tensor
    places: Tensor
    activations: Tensor
    """Of the feature along that sequence, float32 `[m, length]`."""


def _by_feature_and_lot(known: Tensor) -> Tensor:
    order = known[:, 1].argsort(descending=True, stable=True)
    return order[known[order, 0].argsort(stable=True)]


class Examples:
    """Adds up sequence after sequence, in the order of their numbers."""

    def __init__(
        self, count: int, drawn: int, d_sae: int, length: int, device: torch.device, features: Tensor | None = None
    ) -> None:
        """features `[d_sae]`: their numbers, where these are some of many; what is drawn of each is the same then."""
        self._names = torch.arange(d_sae, device=device) if features is None else features
        self.strongest = Kept.nothing(count, d_sae, length, device)
        self.drawn = Drawn(drawn, d_sae, length, device)
        self.firing = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """Sequences in which each feature fires."""
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int64, device=device)
        """Tokens on which it fires, by activation, see `bin_edges`."""

    def add(self, activations: Tensor, numbers: Tensor, documents: Tensor, positions: Tensor) -> None:
        """activations `[b, length, d_sae]`, 0 at tokens that do not count; numbers `[b]` of the sequences; documents and
        positions in them, of the tokens, `[b, length]`."""
        activations = activations.float()
        by_feature = activations.transpose(1, 2)
        largest = by_feature.amax(dim=2)
        self.firing += (largest > 0).sum(dim=0)
        self.strongest.add(largest.double(), numbers, by_feature)
        rows, places, features = (activations > 0).nonzero(as_tuple=True)
        bins = bin_of(activations[rows, places, features])
        self.histogram.view(-1).index_add_(0, features * BINS + bins, torch.ones_like(features))
        drawn = lots(documents[rows, places], positions[rows, places], self._names[features])
        kept = drawn > self.drawn.least[features]
        rows, places, features, drawn = rows[kept], places[kept], features[kept], drawn[kept]
        self.drawn.add(drawn, features, numbers[rows], places, by_feature[rows, features])

    def include(self, other: Examples) -> None:
        """Those of sequences that come later."""
        self.firing += other.firing
        self.histogram += other.histogram
        self.strongest.add_each(other.strongest.scores, other.strongest.sequences, other.strongest.activations)
        self.drawn.include(other.drawn)


def bin_of(activations: Tensor) -> Tensor:
    """The bin of each float32 over 0: the exponent and the leading bits of the mantissa, so that no logarithm rounds."""
    bits = activations.contiguous().view(torch.int32) >> _BIN_SHIFT
    return (bits - _FIRST_BIN).clamp(0, BINS - 1).long()


def bin_edges() -> np.ndarray:
    """float32 `[BINS + 1]`: four bins of equal width to each octave; the outermost two hold what is beyond them as well."""
    return ((np.arange(BINS + 1, dtype=np.int32) + _FIRST_BIN) << _BIN_SHIFT).view(np.float32)


def lots(documents: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """A number from 0 below 2^62 for each token and feature, int64 `[n]`, the same in every run: the tokens of largest lots are
    a uniform sample."""
    mixed = (documents * _MIX[0] + positions) * _MIX[1] + features
    for shift, odd in ((30, _MIX[1]), (27, _MIX[2]), (31, _MIX[0]), (30, _MIX[1]), (27, _MIX[2])):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * odd
    return (mixed >> 2) & ((1 << 62) - 1)
