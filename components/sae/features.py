"""Feature activations of a batch of tokens, dense or sparse, and what everything that follows a coder does with them.

Nobody asks which of the two they are: with many features a dense `[n, d_sae]` does not fit into memory, with few it is faster.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from components.sae.kernels.sparse import Places, decoded, true_places


class Features(ABC):
    """Activations of `d_sae` features on `n` tokens, none of them negative."""

    d_sae: int

    @abstractmethod
    def __len__(self) -> int:
        """Tokens."""

    @abstractmethod
    def active(self) -> Tensor:
        """How many features fire on each token, `[n]`."""

    @abstractmethod
    def fired(self) -> Tensor:
        """On how many tokens each feature fires, int64 `[d_sae]`."""

    @abstractmethod
    def sums(self) -> Tensor:
        """Sum of each feature's activations, float64 `[d_sae]`."""

    @abstractmethod
    def largest(self) -> Tensor:
        """Each feature's largest activation, float32 `[d_sae]`, 0 where it does not fire."""

    @abstractmethod
    def means(self) -> Tensor:
        """Mean of each feature's activations over the tokens, float32 `[d_sae]`, with its gradient."""

    @abstractmethod
    def decode(self, rows: Tensor, bias: Tensor) -> Tensor:
        """`sum_i f_i rows_i + bias`: rows `[d_sae, d_out]`, bias `[d_out]` -> `[n, d_out]`."""

    @abstractmethod
    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` tokens on which each feature fires most: activations and tokens, `[count, d_sae]` each, largest first;
        activation 0 where it fires on fewer."""

    @abstractmethod
    def firing(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every activation over 0: tokens and features, int64 `[m]` each, in the order of tokens, and the activations `[m]`."""

    @abstractmethod
    def detach(self) -> Features:
        """The same without the way back to the coder."""

    @abstractmethod
    def dense(self) -> Tensor:
        """`[n, d_sae]`; for small numbers of features and for tests."""


@dataclass(frozen=True)
class DenseFeatures(Features):
    """values `[n, d_sae]`."""

    values: Tensor

    @property
    def d_sae(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def active(self) -> Tensor:
        return (self.values > 0).sum(dim=1)

    def fired(self) -> Tensor:
        return (self.values > 0).sum(dim=0)

    def sums(self) -> Tensor:
        return self.values.sum(dim=0, dtype=torch.float64)

    def largest(self) -> Tensor:
        if len(self.values) == 0:
            return self.values.new_zeros(self.d_sae, dtype=torch.float32)
        return self.values.amax(dim=0).float().clamp_min(0.0)

    def means(self) -> Tensor:
        return self.values.float().mean(dim=0)

    def decode(self, rows: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.values, rows.T, bias)

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        found = self.values.clamp_min(0.0).topk(min(count, len(self.values)), dim=0)
        missing = (0, 0, 0, count - len(found.values))
        return torch.nn.functional.pad(found.values, missing), torch.nn.functional.pad(found.indices, missing)

    def firing(self) -> tuple[Tensor, Tensor, Tensor]:
        flat = true_places((self.values > 0).flatten())
        tokens = flat // self.d_sae
        return tokens, flat - tokens * self.d_sae, self.values.flatten()[flat]

    def detach(self) -> DenseFeatures:
        return DenseFeatures(self.values.detach())

    def dense(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class SparseFeatures(Features):
    """The features of token `i` are those from `offsets[i]` to `offsets[i + 1]` (compressed rows): values `[m]`, none negative,
    and their indices `[m]`, no index twice for a token unless its value is 0; offsets `[n + 1]`."""

    values: Tensor
    indices: Tensor
    offsets: Tensor
    d_sae: int
    places: Places | None = None
    """Of the same indices, where gradients go by them."""

    @classmethod
    def of_rows(cls, values: Tensor, indices: Tensor, d_sae: int) -> SparseFeatures:
        """Equally many for every token: values and indices `[n, k]`."""
        offsets = torch.arange(len(values) + 1, device=values.device) * values.shape[1]
        return cls(values.reshape(-1), indices.reshape(-1), offsets, d_sae)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _tokens(self) -> Tensor:
        """Of each value, `[m]`."""
        numbers = torch.arange(len(self), device=self.values.device)
        return torch.repeat_interleave(numbers, self.offsets.diff(), output_size=len(self.values))

    def active(self) -> Tensor:
        firing = (self.values > 0).long()
        return firing.new_zeros(len(self)).index_add(0, self._tokens(), firing)

    def fired(self) -> Tensor:
        return self._per_feature((self.values > 0).long())

    def sums(self) -> Tensor:
        return self._per_feature(self.values.double())

    def largest(self) -> Tensor:
        start = self.values.new_zeros(self.d_sae, dtype=torch.float32)
        return start.scatter_reduce(0, self.indices, self.values.float(), "amax")

    def means(self) -> Tensor:
        return self._per_feature(self.values.float()) / max(1, len(self))

    def decode(self, rows: Tensor, bias: Tensor) -> Tensor:
        # A weighted sum of rows per token: no [m, d_out] is made.
        if self.places is not None:
            return decoded(self.values, rows, self.places) + bias
        weights, starts = self.values.to(rows.dtype), self.offsets[:-1]
        summed = torch.nn.functional.embedding_bag(self.indices, rows, starts, per_sample_weights=weights, mode="sum")
        return summed + bias

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        order = torch.argsort(self.values, descending=True, stable=True)
        order = order[torch.argsort(self.indices[order], stable=True)]
        values, features, tokens = self.values[order], self.indices[order], self._tokens()[order]
        first = torch.searchsorted(features, torch.arange(self.d_sae, device=features.device))
        place = torch.arange(len(features), device=features.device) - first[features]
        kept = (place < count) & (values > 0)
        best = values.new_zeros(count, self.d_sae)
        where = torch.zeros(count, self.d_sae, dtype=torch.long, device=values.device)
        best[place[kept], features[kept]] = values[kept]
        where[place[kept], features[kept]] = tokens[kept]
        return best, where

    def firing(self) -> tuple[Tensor, Tensor, Tensor]:
        kept = self.values > 0
        return self._tokens()[kept], self.indices[kept], self.values[kept]

    def detach(self) -> SparseFeatures:
        return SparseFeatures(self.values.detach(), self.indices, self.offsets, self.d_sae)

    def dense(self) -> Tensor:
        empty = self.values.new_zeros(len(self) * self.d_sae)
        return empty.index_add(0, self._tokens() * self.d_sae + self.indices, self.values).reshape(len(self), self.d_sae)

    def _per_feature(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.d_sae).index_add(0, self.indices, values)
