"""Where each feature fires most, a uniform sample of the tokens on which it fires, and a histogram: one pass, bounded memory.

What is kept is the same however the text is cut into batches and spans: of sequences, those in which a feature's largest
activation is highest (of equal ones, those that came first); of tokens, those of largest lots (see `lots`).
"""

from __future__ import annotations

from collections.abc import Mapping
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
_PLACES = 1 << 42
"""Sequences times length, at most, less a remainder: a feature and a place in the text are one int64."""
_LOT_BITS = 42
"""Of a lot, the leading ones that decide: a feature and a lot are one number to sort then; of equal ones, the first token."""
_LOGGED = 1 << 21
"""Firings that are collected, at least, before those that are not kept are dropped."""


@dataclass(frozen=True)
class Firings:
    """Every activation over 0 of some neighbouring sequences. Of their counted tokens `[n]`, in order: rows (their sequence,
    from 0), places in it, documents, positions and ids; of the activations `[m]`, in the order of tokens: numbers of tokens,
    features and float32 values."""

    rows: Tensor
    places: Tensor
    documents: Tensor
    positions: Tensor
    ids: Tensor
    tokens: Tensor
    features: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Log:
    """Firings, each with its key: `(feature * most sequences + sequence) * length + place`; the lot, the token's id, the
    activation."""

    keys: np.ndarray
    lots: np.ndarray
    ids: np.ndarray
    values: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> _Log:
        return _Log(self.keys[chosen], self.lots[chosen], self.ids[chosen], self.values[chosen])

    @classmethod
    def joined(cls, parts: list[_Log]) -> _Log:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__))

    @classmethod
    def empty(cls) -> _Log:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


@dataclass(frozen=True)
class Found:
    """What `Examples` kept. In the order of features, and then as said."""

    features: np.ndarray
    """Of the strongest sequences, int64 `[p]`, strongest first."""
    sequences: np.ndarray
    drawn: np.ndarray
    """The features of the drawn tokens, int64 `[q]`, in the order of falling lots."""
    drawn_sequences: np.ndarray
    drawn_places: np.ndarray
    drawn_values: np.ndarray
    sampled: np.ndarray
    """The features of the larger sample's tokens, int64 `[s]`, falling lots, with the tokens' ids and the activations."""
    sampled_ids: np.ndarray
    sampled_values: np.ndarray
    length: int
    span: int
    keys: np.ndarray
    values: np.ndarray

    def along(self, features: np.ndarray, sequences: np.ndarray) -> np.ndarray:
        """The activations of each feature along each sequence, float32 `[len(features), length]`; for pairs that are kept."""
        first = features * self.span + sequences * self.length
        starts, stops = np.searchsorted(self.keys, first), np.searchsorted(self.keys, first + self.length)
        counts = stops - starts
        found = np.zeros((len(features), self.length), np.float32)
        rows = np.repeat(np.arange(len(features)), counts)
        entries = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts) + np.repeat(starts, counts)
        found[rows, self.keys[entries] - first[rows]] = self.values[entries]
        return found


class Examples:
    """Adds up sequence after sequence, in the order of their numbers. Memory: `d_sae` times what is kept of a feature, 24 bytes
    for each activation along a kept sequence and each sampled token, three times."""

    def __init__(
        self,
        count: int,
        drawn: int,
        d_sae: int,
        length: int,
        device: torch.device,
        features: Tensor | None = None,
        sampled: int = 0,
    ) -> None:
        """Of each feature `count` sequences, and `drawn` tokens with their sequences; of `sampled` tokens the id and activation
        alone. features `[d_sae]`: their numbers, where these are some of many; what is drawn of each is the same then."""
        self.count, self.drawn, self.sampled, self.length = count, drawn, max(drawn, sampled), length
        self._span = _PLACES // length * length
        self._names = torch.arange(d_sae, device=device) if features is None else features
        self._log, self._more, self._waiting = _Log.empty(), list[_Log](), 0
        # What another sequence or token must exceed to be kept at all.
        self._weakest = torch.zeros(d_sae, device=device)
        self._least = torch.full((2, d_sae), -1, dtype=torch.int64, device=device)
        self.firing = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """Sequences in which each feature fires."""
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int64, device=device)
        """Tokens on which it fires, by activation, see `bin_edges`."""

    def add(self, found: Firings, first: int, sequences: int) -> None:
        """first: the number of the first of so many sequences."""
        d_sae, features, values = len(self.firing), found.features, found.values
        rows, places = found.rows[found.tokens], found.places[found.tokens]
        pairs = rows * d_sae + features
        largest = values.new_zeros(sequences * d_sae).scatter_reduce_(0, pairs, values, "amax")
        self.firing += (largest.view(-1, d_sae) > 0).sum(dim=0)
        self.histogram.view(-1).index_add_(0, features * BINS + bin_of(values), torch.ones_like(features))
        drawn = lots(found.documents[found.tokens], found.positions[found.tokens], self._names[features])
        wanted = (largest.view(-1, d_sae) > self._weakest).view(-1)
        wanted[pairs[drawn > self._least[0, features]]] = True
        kept = wanted[pairs] | (drawn > self._least[1, features])
        keys = features[kept] * self._span + (rows[kept] + first) * self.length + places[kept]
        columns = (keys, drawn[kept], found.ids[found.tokens][kept].int(), values[kept])
        self._append(_Log(*(column.cpu().numpy() for column in columns)))

    def continue_after(self, earlier: Examples) -> None:
        """Of a new one: what `earlier` would not keep, which has all sequences before these, is not kept here either."""
        earlier._compacted()
        self._weakest.copy_(earlier._weakest)
        self._least.copy_(earlier._least)

    def include(self, other: Examples) -> None:
        """Those of sequences that come later."""
        self.firing += other.firing
        self.histogram += other.histogram
        self._append(other._compacted())

    def found(self) -> Found:
        log = self._compacted()
        features, sequences = log.keys // self._span, log.keys % self._span // self.length
        strongest, drawn = self._strongest(log)[0], self._ranked(log)
        taken, more = drawn[0][drawn[1] < self.drawn], drawn[0][drawn[1] < self.sampled]
        places = log.keys % self.length
        return Found(
            features[strongest], sequences[strongest], features[taken], sequences[taken], places[taken], log.values[taken],
            features[more], log.ids[more], log.values[more], self.length, self._span, log.keys, log.values,
        )  # fmt: skip

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for `restore`."""
        log = self._compacted()
        counted = {"firing": self.firing.cpu().numpy(), "histogram": self.histogram.cpu().numpy()}
        return {**counted, **{name: getattr(log, name) for name in _Log.__annotations__}}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Into one that is new."""
        self.firing += torch.from_numpy(arrays["firing"]).to(self.firing)
        self.histogram += torch.from_numpy(arrays["histogram"]).to(self.histogram)
        self._append(_Log(*(arrays[name] for name in _Log.__annotations__)))

    def _append(self, log: _Log) -> None:
        self._more.append(log)
        self._waiting += len(log.keys)
        if self._waiting > max(_LOGGED, len(self._log.keys)):
            self._compacted()

    def _compacted(self) -> _Log:
        """What is kept, in the order of keys; and what another must exceed from now on."""
        if not self._more:
            return self._log
        log, self._more, self._waiting = _Log.joined([self._log, *self._more]), [], 0
        self._log = _Log.empty()
        # By feature is by key: of each they come in the order of sequences and places.
        log = log[_order((log.keys // self._span).astype(np.int32))]
        features = log.keys // self._span
        pairs = np.cumsum(np.diff(log.keys // self.length, prepend=-1) != 0) - 1
        strongest, weakest = self._strongest(log)
        entries, ranks = self._ranked(log)
        wanted = np.zeros(len(log.keys), bool)
        wanted[pairs[strongest]] = True
        wanted[pairs[entries[ranks < self.drawn]]] = True
        kept = wanted[pairs]
        kept[entries[ranks < self.sampled]] = True
        # Never lower than what it began with, of which the sequences are not here.
        self._weakest = torch.maximum(self._weakest, torch.from_numpy(weakest).to(self._weakest.device))
        for number, count in enumerate((self.drawn, self.sampled)):
            last = entries[ranks == count - 1]
            least = torch.full((len(self.firing),), -1)
            least[torch.from_numpy(features[last])] = torch.from_numpy(log.lots[last])
            self._least[number] = torch.maximum(self._least[number], least.to(self._least.device))
        self._log = log[kept]
        return self._log

    def _strongest(self, log: _Log) -> tuple[np.ndarray, np.ndarray]:
        """Of each kept pair of feature and sequence the number of its first entry, strongest first; and of each feature the
        score that another must exceed. Of a sequence of which only a sampled token is left, the score is too low to matter."""
        starts = np.flatnonzero(np.diff(log.keys // self.length, prepend=-1))
        weakest = np.zeros(len(self.firing), np.float32)
        if len(starts) == 0:
            return starts, weakest
        scores, features = np.maximum.reduceat(log.values, starts), log.keys[starts] // self._span
        # Floats over 0 are in the order of their bits; of equal ones the first stays first.
        order = _order(features * (1 << 32) - scores.view(np.int32))
        ranks = ranks_of(features[order])
        last = order[ranks == self.count - 1]
        weakest[features[last]] = scores[last]
        return starts[order[ranks < self.count]], weakest

    def _ranked(self, log: _Log) -> tuple[np.ndarray, np.ndarray]:
        """Entries by feature and then falling lot, and the rank of each in its feature."""
        features = log.keys // self._span
        order = _order(features * (1 << _LOT_BITS) - (log.lots >> (62 - _LOT_BITS)))
        return order, ranks_of(features[order])


def _order(numbers: np.ndarray) -> np.ndarray:
    """As `argsort(kind="stable")`, three times as fast: torch sorts whole numbers by their digits."""
    return torch.from_numpy(numbers).sort(stable=True).indices.numpy()


def ranks_of(groups: np.ndarray) -> np.ndarray:
    """Of each element its number within its run of equal ones."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


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
