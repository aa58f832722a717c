"""The sequences in which each feature fires most, and a uniform sample of those in which it fires: one pass, bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        count = len(self.scores)
        every = torch.cat([self.scores, scores])
        order = every.sort(dim=0, descending=True, stable=True).indices[:count]
        if bool((order < count).all()):
            return
        self.scores = every.gather(0, order)
        self.sequences = torch.cat([self.sequences, sequences[:, None].expand(-1, scores.shape[1])]).gather(0, order)
        places = order[:, :, None].expand(-1, -1, activations.shape[2])
        self.activations = torch.cat([self.activations, activations]).gather(0, places)


class Examples:
    """Adds up sequence after sequence, in the order of their numbers: what is kept does not depend on how they are batched."""

    def __init__(self, count: int, d_sae: int, length: int, device: torch.device) -> None:
        self.strongest = Kept.nothing(count, d_sae, length, device)
        self.sample = Kept.nothing(count, d_sae, length, device)
        self.firing = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """Sequences in which each feature fires."""

    def add(self, activations: Tensor, numbers: Tensor) -> None:
        """activations `[b, length, d_sae]`, 0 at tokens that do not count; numbers `[b]` of the sequences."""
        by_feature = activations.transpose(1, 2).float()
        largest = by_feature.amax(dim=2)
        self.firing += (largest > 0).sum(dim=0)
        self.strongest.add(largest.double(), numbers, by_feature)
        drawn = torch.where(largest > 0, lots(numbers, largest.shape[1]), 0.0)
        self.sample.add(drawn, numbers, by_feature)


def lots(numbers: Tensor, d_sae: int) -> Tensor:
    """A number over 0 and under 1 for each sequence and feature, `[b, d_sae]`, the same in every run: the sequences of largest
    lots are a uniform sample."""
    mixed = numbers[:, None] * _MIX[0] + torch.arange(d_sae, device=numbers.device)[None] * _MIX[1]
    for shift in (30, 27, 31):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * _MIX[2]
    return (((mixed >> 12) & ((1 << 52) - 1)) + 1).double() / (2.0**52 + 1)
