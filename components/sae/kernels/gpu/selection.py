"""The encoder's product with the choice of the strongest features fused behind it, tile by tile.

Nothing is asked of the device.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from components.sae.kernels.sizes import GROUP

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE_ENTRIES = 1 << 28
"""Of products that are held at once: 1 GB."""
_TOKENS, _FEATURES, _INNER = (32, 64, 32) if INTERPRETED else (128, 256, 64)
_ALIGNED_BYTES = 16
"""Of rows that are copied by a descriptor."""
_STRIPE = 8
"""Tiles of tokens that go through the features together, so that both operands stay in the cache."""
_MOST = 1 << 15
"""Entries of a row among which a program chooses at once."""
LEAST_NORM = 1e-20
"""So that the strength of a feature that writes nothing can be divided by it again."""


@triton.jit
def _encode(
    x, rows, bias, norms, strengths, largest, n, d_in, d_sae,
    NORMED: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    STRIPE: tl.constexpr,
):  # fmt: skip
    """strengths `[n, d_sae]`: `(x . rows + bias) norms`, and the largest of each group of features `[n, d_sae / GROUP]`.
    x and rows are descriptors, by which blocks are copied without the threads."""
    tiles, across = tl.cdiv(n, TOKENS), tl.cdiv(d_sae, FEATURES)
    stripe = tl.program_id(0) // (STRIPE * across)
    height = tl.minimum(tiles - stripe * STRIPE, STRIPE)
    inside_stripe = tl.program_id(0) % (STRIPE * across)
    first_token = (stripe * STRIPE + inside_stripe % height) * TOKENS
    first = (inside_stripe // height) * FEATURES
    total = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    for start in range(0, d_in, INNER):
        total = tl.dot(x.load([first_token, start]), rows.load([first, start]).T, total)
    token, feature = first_token.to(tl.int64) + tl.arange(0, TOKENS), first + tl.arange(0, FEATURES)
    total += tl.load(bias + feature, mask=feature < d_sae, other=0.0)[None, :]
    if NORMED:
        total *= tl.load(norms + feature, mask=feature < d_sae, other=0.0)[None, :]
    groups = tl.max(tl.reshape(total, (TOKENS, FEATURES // GROUP, GROUP)), axis=2)
    group, count = first // GROUP + tl.arange(0, FEATURES // GROUP), d_sae // GROUP
    where = largest + token[:, None] * count + group[None, :]
    tl.store(where, groups, mask=(token[:, None] < n) & (group[None, :] < count))
    inside = (token[:, None] < n) & (feature[None, :] < d_sae)
    tl.store(strengths + token[:, None] * d_sae + feature[None, :], total, mask=inside)


@triton.jit
def _strongest(
    source, groups, values, places, width, count, k,
    GROUPED: tl.constexpr, GROUP: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """places `[n, k]` of the k largest of each row of source `[n, width]`, the first where several are equal, and their values.
    GROUPED: only those in `count` groups `[n, count]` of the row are looked at.

    The k-th largest is found bit by bit, from the number of entries that reach a bound.
    """
    token = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    if GROUPED:
        group = tl.load(groups + token * count + entry // GROUP, mask=entry < count * GROUP, other=0)
        place = group * GROUP + entry % GROUP
        inside = entry < count * GROUP
    else:
        place = entry
        inside = entry < width
    value = tl.load(source + token * width + place, mask=inside, other=-float("inf"))
    bits = value.to(tl.int32, bitcast=True)
    # Floats in the order of unsigned integers; what is outside comes last.
    order = tl.where(bits < 0, ~bits, bits | (-2147483648)).to(tl.uint32, bitcast=True)
    order = tl.where(inside, order, 0)
    bound = tl.zeros((), dtype=tl.uint32)
    for step in tl.static_range(32):
        higher = bound | (1 << (31 - step))
        bound = tl.where(tl.sum((order >= higher).to(tl.int32), axis=0) >= k, higher, bound)
    above = order > bound
    equal = (order == bound) & inside
    missing = k - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= missing))
    where = token * k + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(places + where, place, mask=chosen)
    tl.store(values + where, value, mask=chosen)


def largest_of_rows(source: Tensor, k: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row of source, float32 `[n, width]`, and their places (int32), `[n, k]` both, in the order of
    places; of some groups `[n, count]` of the row alone where those are given."""
    n, width = source.shape
    count = 0 if groups is None else groups.shape[1]
    entries = width if groups is None else count * GROUP
    assert k <= entries
    values, places = source.new_empty(n, k), torch.empty(n, k, dtype=torch.int32, device=source.device)
    if entries > _MOST:
        found = source if groups is None else source.gather(1, _members(groups))
        best = found.topk(k, dim=1, sorted=False)
        places = best.indices if groups is None else _members(groups).gather(1, best.indices)
        return best.values, places.int()
    ENTRIES = triton.next_power_of_2(entries)
    _strongest[(n,)](
        source, source if groups is None else groups, values, places, width, count, k,
        GROUPED=groups is not None, GROUP=GROUP, ENTRIES=ENTRIES, num_warps=max(1, min(16, ENTRIES // 512)),
    )  # fmt: skip
    return values, places


def _members(groups: Tensor) -> Tensor:
    return (groups[:, :, None].long() * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)


def strongest_of_rows(x: Tensor, rows: Tensor, bias: Tensor, norms: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`selection.strongest_of_rows` with the encoder as rows `[d_sae, d_in]`, in the order of features. The k strongest
    features of a token are in the k groups of largest maximum: nothing else is looked at.

    x and rows in bfloat16 (or float16): their products, summed in float32; else torch's own product. d_sae: a multiple of 32.
    """
    d_sae = len(rows)
    assert d_sae % GROUP == 0
    k, count = min(k, d_sae), d_sae // GROUP
    norms = None if norms is None else norms.clamp_min(LEAST_NORM)
    tile = max(_TOKENS, min(len(x), _TILE_ENTRIES // d_sae) // _TOKENS * _TOKENS)
    strengths = torch.empty(min(tile, len(x)), d_sae, device=x.device)
    product = _in_float32 if x.dtype == torch.float32 else _of_halves
    found = []
    for part, largest in product(x, rows, bias, norms, strengths):
        groups = largest_of_rows(largest, k)[1] if k < count else None
        found.append(largest_of_rows(strengths[: len(part)], k, groups))
    values, indices = (torch.cat([part[side] for part in found]) if len(found) > 1 else found[0][side] for side in range(2))
    indices = indices.long()
    return (values if norms is None else values / norms[indices]), indices


def _of_halves(
    x: Tensor, rows: Tensor, bias: Tensor, norms: Tensor | None, strengths: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each tile of x: it, and the largest strength of each group of features, while `strengths` holds all of them."""
    x, rows = _aligned(x), _aligned(rows)
    tile, d_sae = strengths.shape
    largest = torch.empty(tile, d_sae // GROUP, device=x.device)
    features = TensorDescriptor.from_tensor(rows, [_FEATURES, _INNER])
    for part in x.split(tile):
        _encode[(triton.cdiv(len(part), _TOKENS) * triton.cdiv(d_sae, _FEATURES),)](
            TensorDescriptor.from_tensor(part, [_TOKENS, _INNER]), features, bias, bias if norms is None else norms,
            strengths, largest, len(part), x.shape[1], d_sae,
            NORMED=norms is not None, TOKENS=_TOKENS, FEATURES=_FEATURES, INNER=_INNER, GROUP=GROUP, STRIPE=_STRIPE,
            num_warps=8, num_stages=4,
        )  # fmt: skip
        yield part, largest[: len(part)]


def _in_float32(
    x: Tensor, rows: Tensor, bias: Tensor, norms: Tensor | None, strengths: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    for part in x.split(len(strengths)):
        found = torch.addmm(bias, part, rows.T, out=strengths[: len(part)])
        if norms is not None:
            found *= norms
        yield part, found.view(len(part), -1, GROUP).amax(dim=2)


def _aligned(rows: Tensor) -> Tensor:
    """Rows that follow one another in memory, each of a length that a descriptor accepts: zeros are added."""
    missing = -rows.shape[1] % (_ALIGNED_BYTES // rows.element_size())
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()
