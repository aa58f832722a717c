"""Coders that choose no number of features: what is over a bound, where that is little enough for a sparse step to pay."""

from __future__ import annotations

import torch
from torch import Tensor

from components.sae.kernels.rows import uses_triton
from components.sae.kernels.sizes import GROUP, LARGE
from components.sae.kernels.sparse import Places, can_be_sparse, encoded, true_places

MANY_ENTRIES = 1 << 26
"""Of pre-activations, 256 MB, over which they are no longer held at once in an evaluation."""
_LEAST_TOKENS = 256
_PAYS_BELOW = 0.04
"""Share of features over the bound at which a sparse step takes as long as a dense one, less some."""
_ASKED = 32
"""One token of so many says how large that share is."""
_TILE_ENTRIES = 1 << 24


@torch.no_grad()
def is_sparse(x: Tensor, W_enc: Tensor, bias: Tensor) -> bool:
    """Whether a step on x `[n, d_in]` is better sparse: asked of its first tokens, so that a resumed training decides alike.
    bias `[d_sae]`: what is over `-x W_enc - bias` counts."""
    d_in, d_sae = W_enc.shape
    if not can_be_sparse(x) or d_in < LARGE[0] or d_sae < LARGE[1] or len(x) < _LEAST_TOKENS:
        return False
    return _few(x, W_enc, bias)


def without_gradient(x: Tensor, W_enc: Tensor, bias: Tensor | None = None) -> bool:
    """Whether features of x are to be found by tiles because `[n, d_sae]` would be large: where no gradient is wanted. bias: as
    in `is_sparse`, where it depends on it how many there are."""
    by_tiles = x.device.type == "cpu" or (uses_triton(x) and W_enc.shape[1] % GROUP == 0)
    if not by_tiles or torch.is_grad_enabled() or len(x) * W_enc.shape[1] <= MANY_ENTRIES:
        return False
    return bias is None or _few(x, W_enc, bias)


def _few(x: Tensor, W_enc: Tensor, bias: Tensor) -> bool:
    some = torch.nn.functional.linear(x[: max(64, len(x) // _ASKED)], W_enc.T, bias) > 0
    return int(some.sum()) < _PAYS_BELOW * some.numel()


def over_bound(x: Tensor, W_enc: Tensor, b_enc: Tensor, bound: Tensor | None = None) -> tuple[Tensor, Tensor, Places]:
    """Pre-activations `x W_enc + b_enc` that are over a feature's bound `[d_sae]` (0 where not given), with their gradient, the
    feature of each and where they are: `[m]`, token by token."""
    with torch.no_grad():
        bias = b_enc if bound is None else b_enc - bound
        tokens, features, values, start = [], [], [], 0
        held = x.new_empty(max(64, _TILE_ENTRIES // W_enc.shape[1]), W_enc.shape[1])
        for part in x.split(len(held)):
            product = torch.addmm(bias, part, W_enc, out=held[: len(part)]).flatten()
            flat = true_places(product > 0)
            token = flat // len(bias)
            tokens.append(token + start)
            features.append(flat - token * len(bias))
            values.append(product[flat])
            start += len(part)
        indices, before = torch.cat(features), torch.cat(values)
        if bound is not None:
            before = before + bound[indices]
        counts = torch.bincount(torch.cat(tokens), minlength=len(x))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        places = Places.of(indices, offsets, W_enc.shape[1])
    return encoded(x, W_enc, b_enc, before, places), indices, places
