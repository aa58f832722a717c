"""Sparse steps: one dense product, the encoder's, and everything else over the features that were chosen.

With k of d_sae features active, four of the five dense products of a step are nearly all zeros. Here the gradients of both
matrices are weighted sums of rows, over the chosen places sorted by feature, and nothing of the size
`[n, d_sae]` outlives a tile of tokens. Values and gradients are those of the dense formulas, up to the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from components.sae.kernels.lowered import in_bfloat16
from components.sae.kernels.rows import always_triton, products_of_pairs, uses_triton, weighted_rows
from components.sae.kernels.sizes import GROUP, LARGE


@dataclass(frozen=True)
class Places:
    """Features of n tokens, compressed by rows: token i has those from `offsets[i]` to `offsets[i + 1]`."""

    indices: Tensor
    """int64 `[m]`"""
    offsets: Tensor
    """int64 `[n + 1]`"""
    by_feature: Tensor
    """The order that sorts `indices`, int64 `[m]`."""
    starts: Tensor
    """Where each feature begins in that order, and the last one ends, int64 `[d_sae + 1]`."""
    tokens: Tensor
    """Of each place, in that order, int64 `[m]`."""
    owners: Tensor
    """The same in the order of `indices`."""

    @classmethod
    def of(cls, indices: Tensor, offsets: Tensor, d_sae: int) -> Places:
        # Short keys are sorted in half of the time.
        order = torch.argsort(indices.int() if indices.is_cuda else indices, stable=True)
        # Not by bincount, which waits for a GPU.
        starts = indices.new_zeros(d_sae + 1).index_add_(0, indices + 1, torch.ones_like(indices)).cumsum(0)
        numbers = torch.arange(len(offsets) - 1, device=indices.device)
        tokens = torch.repeat_interleave(numbers, offsets.diff(), output_size=len(indices))
        return cls(indices, offsets, order, starts, tokens[order], tokens)

    @cached_property
    def _pieces(self) -> Any:
        from components.sae.kernels.gpu.rows import Pieces

        return Pieces.of(self.starts, len(self.indices))

    def sums(self, read: Tensor, weights: Tensor) -> Tensor:
        """On a GPU, for each feature the sum of read `[n, width]` over its tokens, times weights `[m]`: `[d_sae, width]`."""
        from components.sae.kernels.gpu.rows import sums_of_features

        return sums_of_features(self.starts, self.by_feature, self.tokens, self._pieces, read, weights)


def _in_bfloat16(x: Tensor) -> bool:
    """Whether products of x are in bfloat16."""
    return uses_triton(x) and torch.is_autocast_enabled(x.device.type)


def can_be_sparse(x: Tensor) -> bool:
    """Whether these paths apply: on a CPU, in float32 or float64 products, with no gradient wanted of what is read."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not x.requires_grad


def can_be_sparse_on_gpu(x: Tensor, d_sae: int) -> bool:
    """Whether the same apply by the kernels of `gpu`, and pay: a small coder's step is over before they are all begun."""
    large = (x.shape[1] >= LARGE[0] and d_sae >= LARGE[1]) or always_triton()
    return uses_triton(x) and large and not x.requires_grad and d_sae % GROUP == 0


def goes_by_the_chosen(x: Tensor, d_sae: int, alone: bool) -> bool:
    """Whether a coder that chooses k features takes a sparse step on x. alone: in one process."""
    return can_be_sparse(x) or (alone and can_be_sparse_on_gpu(x, d_sae))


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, before: Tensor, places: Places) -> Tensor:
        context.save_for_backward(x.bfloat16() if _in_bfloat16(x) else x, W_enc)
        context.places = places
        return before.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        x, W_enc = context.saved_tensors
        places: Places = context.places
        if uses_triton(x):
            bias = places.sums(x.new_ones(len(x), 1), gradient).flatten()
            return None, places.sums(x, gradient).T, bias, None, None
        sorted_gradient = gradient[places.by_feature]
        rows = weighted_rows(places.tokens, x, places.starts, sorted_gradient)
        bias = gradient.new_zeros(W_enc.shape[1]).index_add_(0, places.indices, gradient)
        return None, rows.T, bias, None, None


def encoded(x: Tensor, W_enc: Tensor, b_enc: Tensor, before: Tensor, places: Places) -> Tensor:
    """Pre-activations before `[m]` at places, as they were found without a gradient, with their gradient to W_enc and b_enc."""
    result: Tensor = _Encoded.apply(x, W_enc, b_enc, before, places)
    return result


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, rows: Tensor, places: Places) -> Tensor:
        context.half = _in_bfloat16(rows)
        rows = in_bfloat16(rows) if context.half else rows
        context.save_for_backward(values, rows)
        context.places = places
        return weighted_rows(places.indices, rows, places.offsets, values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        values, rows = context.saved_tensors
        places: Places = context.places
        gradient = gradient.contiguous()
        if uses_triton(rows):
            gradient = gradient.bfloat16() if context.half else gradient
            products = products_of_pairs(rows, places.indices, gradient, places.owners)
            return products, places.sums(gradient, values), None
        sorted_values = values[places.by_feature]
        to_rows = weighted_rows(places.tokens, gradient, places.starts, sorted_values)
        to_values = torch.empty_like(values)
        to_values[places.by_feature] = products_of_pairs(rows, places.indices[places.by_feature], gradient, places.tokens)
        return to_values, to_rows, None


def decoded(values: Tensor, rows: Tensor, places: Places) -> Tensor:
    """`sum_i f_i rows_i` of each token: values `[m]` at places, rows `[d_sae, d_out]` -> `[n, d_out]`."""
    result: Tensor = _Decoded.apply(values, rows, places)
    return result


def true_places(mask: Tensor) -> Tensor:
    """`mask.nonzero()` of bool `[m]`, m a multiple of 8, where few are true: eight are looked at as one."""
    if len(mask) % 8:
        return mask.nonzero().flatten()
    eights = mask.view(torch.int64).nonzero().flatten()
    bits = mask.view(-1, 8)[eights].view(-1).nonzero().flatten()
    return eights[bits >> 3] * 8 + (bits & 7)
