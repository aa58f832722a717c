"""The same arithmetic on a GPU, in Triton. torch for CUDA brings Triton with it.

Checked against float64 in Triton's interpreter on a CPU (`tests/integration/test_gpu_kernels.py`) and, where there is a GPU, by
`make bench-gpu`. A step takes these kernels where `SAE_TRITON=1` is set: until they are measured, torch's own are the default.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE_ENTRIES = 1 << 27
"""Of products that are held at once."""
_GROUP = 32
"""Features whose largest product stands for them."""
_TOKENS, _FEATURES, _INNER = (32, 64, 32) if INTERPRETED else (128, 128, 64)
_WIDTH = 256
"""Columns that a program sums at once."""


@triton.jit
def _encode(
    x, rows, bias, norms, strengths, largest, n, d_in, d_sae,
    NORMED: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """strengths `[n, d_sae]`: `(x . rows + bias) norms`, and the largest of each group of features `[n, d_sae / GROUP]`."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    for start in range(0, d_in, INNER):
        inner = start + tl.arange(0, INNER)
        left = tl.load(
            x + token[:, None] * d_in + inner[None, :],
            mask=(token[:, None] < n) & (inner[None, :] < d_in),
            other=0.0,
        )
        right = tl.load(
            rows + feature[None, :].to(tl.int64) * d_in + inner[:, None],
            mask=(feature[None, :] < d_sae) & (inner[:, None] < d_in),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    total += tl.load(bias + feature, mask=feature < d_sae, other=0.0)[None, :]
    if NORMED:
        total *= tl.load(norms + feature, mask=feature < d_sae, other=0.0)[None, :]
    inside = (token[:, None] < n) & (feature[None, :] < d_sae)
    tl.store(strengths + token[:, None] * d_sae + feature[None, :], total, mask=inside)
    groups = tl.max(tl.reshape(tl.where(inside, total, -float("inf")), (TOKENS, FEATURES // GROUP, GROUP)), axis=2)
    group = tl.program_id(1) * (FEATURES // GROUP) + tl.arange(0, FEATURES // GROUP)
    count = d_sae // GROUP
    where = largest + token[:, None] * count + group[None, :]
    tl.store(where, groups, mask=(token[:, None] < n) & (group[None, :] < count))


@triton.jit
def _weighted(indices, rows, offsets, weights, out, width, WIDTH: tl.constexpr):
    """out `[bags, width]`: for each bag the sum of its rows, each times its weight, in float32."""
    bag, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for place in range(tl.load(offsets + bag), tl.load(offsets + bag + 1)):
        row = tl.load(rows + tl.load(indices + place) * width + column, mask=column < width, other=0.0)
        total += tl.load(weights + place).to(tl.float32) * row.to(tl.float32)
    tl.store(out + bag * width + column, total, mask=column < width)


@triton.jit
def _pairs(rows, places, others, other_places, out, width, WIDTH: tl.constexpr):
    """out `[m]`: the product of a row with another, in float32."""
    pair = tl.program_id(0).to(tl.int64)
    left, right = rows + tl.load(places + pair) * width, others + tl.load(other_places + pair) * width
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        a = tl.load(left + column, mask=column < width, other=0.0).to(tl.float32)
        total += a * tl.load(right + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + pair, tl.sum(total, axis=0))


def strongest_of_rows(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None, k: int, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """`selection.strongest_of_rows`, without asking the device for anything. The k strongest features of a token are in the k
    groups of largest maximum: of nothing else is the order wanted. Under autocast the product is one in bfloat16.

    precision: of a product in float32, `ieee` or `tf32`. d_sae: a multiple of 32.
    """
    d_in, d_sae = W_enc.shape
    assert d_sae % _GROUP == 0
    k, count = min(k, d_sae), d_sae // _GROUP
    half = torch.is_autocast_enabled(x.device.type)
    rows = W_enc.T.contiguous()
    if half:
        x, rows = x.bfloat16(), rows.bfloat16()
    x = x.contiguous()
    scale = torch.ones_like(b_enc) if norms is None else norms.clamp_min(1e-20)
    members, found = torch.arange(_GROUP, device=x.device), []
    tile = max(_TOKENS, min(len(x), _TILE_ENTRIES // d_sae))
    strengths = torch.empty(tile, d_sae, device=x.device)
    largest = torch.empty(tile, count, device=x.device)
    for part in x.split(tile):
        n = len(part)
        _encode[(triton.cdiv(n, _TOKENS), triton.cdiv(d_sae, _FEATURES))](
            part, rows, b_enc, scale, strengths, largest, n, d_in, d_sae,
            NORMED=norms is not None, TOKENS=_TOKENS, FEATURES=_FEATURES, INNER=_INNER, GROUP=_GROUP, PRECISION=precision,
        )  # fmt: skip
        groups = largest[:n].topk(min(k, count), dim=1, sorted=False).indices
        some = (groups[:, :, None] * _GROUP + members).flatten(1)
        best = strengths[:n].gather(1, some).topk(k, dim=1, sorted=False)
        found.append((best.values, some.gather(1, best.indices)))
    values, indices = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
    return values / scale[indices], indices


def weighted_rows(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """`rows.weighted_rows`."""
    rows = rows.contiguous()
    out = torch.empty(len(offsets) - 1, rows.shape[1], device=rows.device, dtype=rows.dtype)
    grid: Any = (len(out), triton.cdiv(rows.shape[1], _WIDTH))
    _weighted[grid](indices, rows, offsets, weights.contiguous(), out, rows.shape[1], WIDTH=_WIDTH)
    return out


def products_of_pairs(rows: Tensor, places: Tensor, others: Tensor, other_places: Tensor) -> Tensor:
    """`rows.products_of_pairs`."""
    rows, others = rows.contiguous(), others.contiguous()
    out = torch.empty(len(places), device=rows.device, dtype=rows.dtype)
    if len(places):
        _pairs[(len(places),)](rows, places, others, other_places, out, rows.shape[1], WIDTH=_WIDTH)
    return out
