"""Sparse steps on a CPU: one dense product, the encoder's, and everything else over the features that were chosen.

With k of d_sae features active, four of the five dense products of a step are nearly all zeros. Here the gradients of both
matrices are weighted sums of rows, by `embedding_bag` over the chosen places sorted by feature, and nothing of the size
`[n, d_sae]` outlives a tile of tokens. Values and gradients are those of the dense formulas, up to the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_TILE_ENTRIES = 1 << 24
"""Of products that are held at once: 64 MB."""
_CANDIDATES = 4
_ALIGNED = 16
"""Columns of the product's operands are a multiple of it."""
_LEAST_NORM = 1e-20
"""So that the strength of a feature that writes nothing can be divided by it again."""


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
    """Where each feature begins in that order, int64 `[d_sae]`."""
    tokens: Tensor
    """Of each place, in that order, int64 `[m]`."""

    @classmethod
    def of(cls, indices: Tensor, offsets: Tensor, d_sae: int) -> Places:
        order = torch.argsort(indices, stable=True)
        counts = torch.bincount(indices, minlength=d_sae)
        tokens = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff(), output_size=len(indices))
        return cls(indices, offsets, order, counts.cumsum(0) - counts, tokens[order])


def can_be_sparse(x: Tensor) -> bool:
    """Whether these paths apply: on a CPU, in float32 or float64 products, with no gradient wanted of what is read."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not x.requires_grad


@torch.no_grad()
def strongest_of_rows(x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """For each token of x `[n, d_in]` the k features of largest `relu(x W_enc + b_enc)` times norms `[d_sae]`: pre-activations
    and indices, `[n, k]` each, in no order. Tokens with fewer positive ones get others as well, of any pre-activation."""
    d_sae = W_enc.shape[1]
    k = min(k, d_sae)
    # One product for strengths, bias and norms included: no further pass over [n, d_sae].
    rows = W_enc.new_zeros(d_sae, -(-(len(W_enc) + 1) // _ALIGNED) * _ALIGNED)
    rows[:, : len(W_enc)], rows[:, len(W_enc)] = W_enc.T, b_enc
    if norms is not None:
        norms = norms.clamp_min(_LEAST_NORM)
        rows *= norms[:, None]
    padded = torch.cat([x, x.new_ones(len(x), 1), x.new_zeros(len(x), rows.shape[1] - x.shape[1] - 1)], dim=1)
    tile = max(64, _TILE_ENTRIES // d_sae)
    found = [(part @ rows.T).topk(k, dim=1, sorted=False) for part in padded.split(tile)]
    strengths, indices = torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
    return strengths if norms is None else strengths / norms[indices], indices


@torch.no_grad()
def strongest_of_batch(x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `n k` features of largest `relu(x W_enc + b_enc)` times norms over the whole batch: their pre-activations and places
    `token * d_sae + feature`, `[m]` each in the order of places, and the smallest strength among them that is over zero, 0
    where none is.

    A few times k of each token suffice to find them, unless all of a token's are among them: such tokens are looked at whole.
    """
    d_sae = W_enc.shape[1]
    count, most = min(k, d_sae) * len(x), min(d_sae, _CANDIDATES * k)
    before, indices = strongest_of_rows(x, W_enc, b_enc, norms, most)
    strengths, places = torch.relu(before) * norms[indices], indices + d_sae * torch.arange(len(x))[:, None]
    least = strengths.flatten().topk(count).values[-1]
    full = strengths.amin(dim=1) > least
    flat, where, values = strengths.flatten(), places.flatten(), before.flatten()
    if most < d_sae and bool(full.any()):
        rows = full.nonzero().flatten()
        whole, indices = strongest_of_rows(x[rows], W_enc, b_enc, norms, d_sae)
        flat = torch.cat([strengths[~full].flatten(), (torch.relu(whole) * norms[indices]).flatten()])
        where = torch.cat([places[~full].flatten(), (indices + d_sae * rows[:, None]).flatten()])
        values = torch.cat([before[~full].flatten(), whole.flatten()])
    chosen = flat.topk(count, sorted=False).indices
    chosen = chosen[where[chosen].argsort()]
    positive = flat[chosen]
    weakest = torch.where(positive > 0, positive, torch.inf).amin()
    return values[chosen], where[chosen], torch.where(weakest.isfinite(), weakest, torch.zeros_like(weakest))


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, before: Tensor, places: Places) -> Tensor:
        context.save_for_backward(x, W_enc)
        context.places = places
        return before.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        x, W_enc = context.saved_tensors
        places: Places = context.places
        sorted_gradient = gradient[places.by_feature]
        rows = embedding_bag(places.tokens, x, places.starts, per_sample_weights=sorted_gradient, mode="sum")
        bias = gradient.new_zeros(W_enc.shape[1]).index_add_(0, places.indices, gradient)
        return None, rows.T, bias, None, None


def encoded(x: Tensor, W_enc: Tensor, b_enc: Tensor, before: Tensor, places: Places) -> Tensor:
    """Pre-activations before `[m]` at places, as they were found without a gradient, with their gradient to W_enc and b_enc."""
    result: Tensor = _Encoded.apply(x, W_enc, b_enc, before, places)
    return result


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, rows: Tensor, places: Places) -> Tensor:
        context.save_for_backward(values, rows)
        context.places = places
        return embedding_bag(places.indices, rows, places.offsets[:-1], per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        values, rows = context.saved_tensors
        places: Places = context.places
        gradient = gradient.contiguous()
        sorted_values = values[places.by_feature]
        to_rows = embedding_bag(places.tokens, gradient, places.starts, per_sample_weights=sorted_values, mode="sum")
        tokens = torch.empty_like(places.tokens)
        tokens[places.by_feature] = places.tokens
        to_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            gradient, rows, places.indices, places.offsets[:-1], tokens, 0, -1
        )
        return to_values, to_rows, None


def decoded(values: Tensor, rows: Tensor, places: Places) -> Tensor:
    """`sum_i f_i rows_i` of each token: values `[m]` at places, rows `[d_sae, d_out]` -> `[n, d_out]`."""
    result: Tensor = _Decoded.apply(values, rows, places)
    return result
