"""The strongest features by a product in bfloat16 that no choice depends on.

Half of the bits are multiplied in half of the time, or less, on CPUs that have instructions for it. How far such a product can
be off is bounded for each token (Cauchy-Schwarz over the rounding errors of both operands), so what may be among the
strongest is known for certain. Those few are computed again in float32, and alone decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from components.sae.kernels.rows import products_of_pairs

_ALIGNED = 32
"""Columns of the product's operands are a multiple of it."""
_BIAS_COLUMNS = 3
"""In bfloat16 that add up to a float32."""
_FINE, _COARSE = 8, 64
"""Features in a group whose largest product stands for it."""
_CHUNK = 1_024
_LEAST_WIDTH, _LEAST_FEATURES, _LEAST_TOKENS = 256, 4_096, 256
"""Below any of these the product is too small a part of a step."""
_ROUNDING = 2.0**-8
"""Of a number to bfloat16, relative, and twice that."""
_ACCUMULATED = 2.0**-23
"""Of each addition in float32, relative, and twice that."""


def pays(x: Tensor, d_sae: int, budget: int) -> bool:
    """Whether x `[n, d_in]` is better screened first: wide enough, in float32, on a CPU that multiplies bfloat16."""
    large = x.shape[1] >= _LEAST_WIDTH and d_sae >= _LEAST_FEATURES and len(x) >= _LEAST_TOKENS
    fits = d_sae % _COARSE == 0 and d_sae >= 8 * _FINE * budget // 4
    return large and fits and x.dtype == torch.float32 and _multiplies_bfloat16()


def _multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


@dataclass(frozen=True)
class Rows:
    """What is multiplied with tokens: for each feature its encoder column and bias, times its norm."""

    rounded: Tensor
    """bfloat16 `[d_sae, columns]`, the bias in the columns after d_in."""
    centre: Tensor
    """What is taken from each token, `[d_in]`."""
    longest: float
    """Largest norm of a row."""
    furthest: float
    """Largest norm of what rounding takes from a row."""

    @classmethod
    def of(cls, rows: Tensor, bias: Tensor, norms: Tensor | None, centre: Tensor) -> Rows:
        """rows `[d_sae, d_in]`, bias and norms `[d_sae]`."""
        d_sae, d_in = rows.shape
        columns = -(-(d_in + _BIAS_COLUMNS) // _ALIGNED) * _ALIGNED
        rounded = rows.new_zeros(d_sae, columns, dtype=torch.bfloat16)
        longest = furthest = rows.new_zeros(())
        for start in range(0, d_sae, _CHUNK):
            here = slice(start, start + _CHUNK)
            part, offset = rows[here], rows[here] @ centre + bias[here]
            if norms is not None:
                part, offset = part * norms[here, None], offset * norms[here]
            rounded[here, :d_in] = part
            for place in range(_BIAS_COLUMNS):
                rounded[here, d_in + place] = offset
                offset = offset - rounded[here, d_in + place].float()
            longest = torch.maximum(longest, part.norm(dim=1).amax())
            furthest = torch.maximum(furthest, (part - rounded[here, :d_in]).norm(dim=1).amax())
        return cls(rounded, centre, float(longest), float(furthest))

    def products(self, x: Tensor, tile: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tile of tokens the products in bfloat16 `[tile, d_sae]`, which live until the next, and by how much one may
        be off before it was rounded to that, `[tile]`."""
        d_in, columns = x.shape[1], self.rounded.shape[1]
        held = self.rounded.new_empty(min(tile, len(x)), len(self.rounded))
        for part in x.split(tile):
            moved = part - self.centre
            rounded = self.rounded.new_zeros(len(part), columns)
            rounded[:, :d_in] = moved
            rounded[:, d_in : d_in + _BIAS_COLUMNS] = 1.0
            lengths = moved.norm(dim=1)
            error = (moved - rounded[:, :d_in]).norm(dim=1) * self.longest + lengths * (1 + _ROUNDING) * self.furthest
            error += columns * _ACCUMULATED * (lengths + self.centre.norm() + 1) * self.longest
            yield torch.mm(rounded, self.rounded.T, out=held[: len(part)]), error


@dataclass(frozen=True)
class Groups:
    """A tile's products `[n, d_sae]` and the largest of each group of `_FINE`, `[n, d_sae / _FINE]`: feature j is in group
    `j % (d_sae / _FINE)`."""

    products: Tensor
    largest: Tensor

    @classmethod
    def of(cls, products: Tensor) -> Groups:
        n, d_sae = products.shape
        return cls(products, products.view(n, _FINE, d_sae // _FINE).amax(dim=1))

    def bound(self, count: int) -> Tensor:
        """What at least `count` products of each token reach, and few more: bfloat16 `[n]`."""
        largest, size = self.largest, _COARSE // _FINE
        n, width = largest.shape
        if width >= 4 * count * size:
            largest = largest.view(n, size, width // size).amax(dim=1)
        return largest.topk(count, dim=1, sorted=False).values.amin(dim=1)

    def reaching(self, bounds: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Products that are at least their token's bound (bfloat16 `[n]`), token by token: tokens, features and products, `[m]`
        each; and which tokens are left out because more than `most` groups have such, bool `[n]`."""
        d_sae, width = self.products.shape[1], self.largest.shape[1]
        tokens, groups = (self.largest >= bounds[:, None]).nonzero(as_tuple=True)
        crowded = torch.bincount(tokens, minlength=len(bounds)) > most
        if bool(crowded.any()):
            kept = ~crowded[tokens]
            tokens, groups = tokens[kept], groups[kept]
        members = torch.arange(_FINE) * width
        some = self.products.view(-1)[(tokens * d_sae + groups)[:, None] + members]
        which, member = (some >= bounds[tokens, None]).nonzero(as_tuple=True)
        return tokens[which], groups[which] + member * width, some[which, member], crowded


def lowered(bounds: Tensor, errors: Tensor) -> Tensor:
    """What a product in bfloat16 must reach so that its exact value may be over those of products that reach `bounds`:
    bfloat16. errors: of both together, float32; any shapes that go together."""
    bounds = bounds.float()
    # Rounding keeps the order, so that the bound itself may be rounded like what is compared with it.
    return (bounds - _ROUNDING * bounds.abs() - errors).bfloat16()


def exact(x: Tensor, rows: Tensor, bias: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """`x W_enc + b_enc` of these tokens and features, `[m]`, in float32: rows `[d_sae, d_in]`."""
    order = features.argsort(stable=True)  # a row is then read once, and tokens stay in the cache
    found = x.new_empty(len(tokens))
    found[order] = products_of_pairs(rows, features[order], x, tokens[order])
    return found + bias[features]
