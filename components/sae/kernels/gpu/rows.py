"""Sums of few rows, and the gradients of a sparse step, feature by feature."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 64
"""Places of a feature that one program goes through: a feature that fires everywhere would keep one busy long after all others
are done."""
_PAIRS = 4
"""Products that one program computes."""


@triton.jit
def _weighted(indices, rows, offsets, weights, out, width, WIDTH: tl.constexpr):
    """out `[bags, width]`: for each bag the sum of its rows, each times its weight, in float32."""
    bag, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for place in range(tl.load(offsets + bag), tl.load(offsets + bag + 1)):
        row = tl.load(rows + tl.load(indices + place).to(tl.int64) * width + column, mask=inside, other=0.0)
        total += tl.load(weights + place).to(tl.float32) * row.to(tl.float32)
    tl.store(out + bag * width + column, total, mask=inside)


@triton.jit
def _of_features(
    features, numbers, starts, order, tokens, read, weights, out, more, width, last, PIECE: tl.constexpr, WIDTH: tl.constexpr
):
    """For a piece of a feature's places the sum of `read[token]` times the weight of the place. The first piece of a feature
    goes to out `[d_sae, width]`, the others to more."""
    program = tl.program_id(0)
    if program < tl.load(last):
        feature, number = tl.load(features + program).to(tl.int64), tl.load(numbers + program)
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = column < width
        total = tl.zeros((WIDTH,), dtype=tl.float32)
        begin = tl.load(starts + feature) + number * PIECE
        end = tl.minimum(begin + PIECE, tl.load(starts + feature + 1))
        for place in range(begin, end):
            row = read + tl.load(tokens + place).to(tl.int64) * width + column
            weight = tl.load(weights + tl.load(order + place)).to(tl.float32)
            total += weight * tl.load(row, mask=inside, other=0.0).to(tl.float32)
        if number == 0:
            tl.store(out + feature * width + column, total, mask=inside)
        else:
            slot = (program - feature - 1).to(tl.int64)
            tl.store(more + slot * width + column, total, mask=inside)


@triton.jit
def _add_pieces(features, ends, out, more, width, count, WIDTH: tl.constexpr):
    """Adds the further pieces of a feature to the first: the program of the first of them does all."""
    slot = tl.program_id(0)
    feature = tl.load(features + slot)
    if feature < count:
        begin = tl.load(ends + feature - 1, mask=feature > 0, other=0)
        if slot == begin:
            column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
            inside = column < width
            total = tl.load(out + feature * width + column, mask=inside, other=0.0)
            for piece in range(begin, tl.load(ends + feature)):
                total += tl.load(more + piece * width + column, mask=inside, other=0.0)
            tl.store(out + feature * width + column, total, mask=inside)


@triton.jit
def _pairs(rows, places, others, other_places, out, count, width, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """out `[m]`: the product of a row with another, in float32."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < count
    left = rows + tl.load(places + pair, mask=inside, other=0).to(tl.int64)[:, None] * width
    right = others + tl.load(other_places + pair, mask=inside, other=0).to(tl.int64)[:, None] * width
    total = tl.zeros((PAIRS, WIDTH), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        mask = inside[:, None] & (column < width)
        a = tl.load(left + column, mask=mask, other=0.0).to(tl.float32)
        total += a * tl.load(right + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + pair, tl.sum(total, axis=1), mask=inside)


@dataclass(frozen=True)
class Pieces:
    """The places of all features, cut into pieces of at most `_PIECE`; every feature has one at least. How many there are is
    not asked of the device."""

    last: Tensor
    """Number of all pieces, int64 `[1]`."""
    features: Tensor
    """Of each piece, int32 `[most]`."""
    numbers: Tensor
    """Of each piece within its feature, int32 `[most]`."""
    further_ends: Tensor
    """Pieces that are not a feature's first, of all features up to this one, int64 `[d_sae]`."""
    further_features: Tensor
    """Of each of those, int64; d_sae where there are no more."""

    @classmethod
    def of(cls, starts: Tensor, count: int) -> Pieces:
        """starts `[d_sae + 1]` of `count` places."""
        further = ((starts.diff() - 1) // _PIECE).clamp_min(0)
        further_ends = further.cumsum(0)
        ends = further_ends + torch.arange(1, len(further) + 1, device=starts.device)
        spare = count // _PIECE
        numbers = torch.arange(len(ends) + spare, device=starts.device)
        features = torch.searchsorted(ends, numbers, right=True).clamp_max(len(ends) - 1)
        begins = ends - 1 - further
        return cls(
            last=ends[-1:],
            features=features.int(),
            numbers=(numbers - begins[features]).int(),
            further_ends=further_ends,
            further_features=torch.searchsorted(further_ends, numbers[:spare], right=True),
        )


def weighted_rows(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """`rows.weighted_rows`, in float32."""
    rows = rows.contiguous()
    width = rows.shape[1]
    out = torch.empty(len(offsets) - 1, width, device=rows.device)
    WIDTH, warps = _columns(width)
    _weighted[(len(out), triton.cdiv(width, WIDTH))](
        indices, rows, offsets, weights.contiguous(), out, width, WIDTH=WIDTH, num_warps=warps
    )
    return out


def products_of_pairs(rows: Tensor, places: Tensor, others: Tensor, other_places: Tensor) -> Tensor:
    """`rows.products_of_pairs`, in float32."""
    rows, others = rows.contiguous(), others.contiguous()
    count, width = len(places), rows.shape[1]
    out = torch.empty(count, device=rows.device)
    WIDTH = min(256, triton.next_power_of_2(width))
    _pairs[(triton.cdiv(count, _PAIRS),)](
        rows, places, others, other_places, out, count, width, PAIRS=_PAIRS, WIDTH=WIDTH, num_warps=1
    )
    return out


def sums_of_features(starts: Tensor, order: Tensor, tokens: Tensor, pieces: Pieces, read: Tensor, weights: Tensor) -> Tensor:
    """For each feature the sum of `read[token]` over its places, each times its weight: float32 `[d_sae, width]`.

    starts, order, tokens: see `sparse.Places`; read `[n, width]`, weights `[m]` in the order of places. Summed in the same
    order every time.
    """
    d_sae, width = len(starts) - 1, read.shape[1]
    out, more = (
        torch.empty(d_sae, width, device=read.device),
        torch.empty(len(pieces.further_features), width, device=read.device),
    )
    WIDTH, warps = _columns(width)
    across = triton.cdiv(width, WIDTH)
    _of_features[(len(pieces.features), across)](
        pieces.features, pieces.numbers, starts, order, tokens, read.contiguous(), weights, out, more, width, pieces.last,
        PIECE=_PIECE, WIDTH=WIDTH, num_warps=warps,
    )  # fmt: skip
    if len(more):
        _add_pieces[(len(more), across)](
            pieces.further_features, pieces.further_ends, out, more, width, d_sae, WIDTH=WIDTH, num_warps=warps
        )
    return out


def _columns(width: int) -> tuple[int, int]:
    """Columns and warps of a program."""
    columns = min(512, triton.next_power_of_2(width))
    return columns, max(1, columns // 256)
