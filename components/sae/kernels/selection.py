"""Which features are the strongest: of each token, or of a whole batch. No gradient is taken of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from components.sae.kernels.asked import Asked
from components.sae.kernels.lowered import in_bfloat16
from components.sae.kernels.rows import uses_triton
from components.sae.kernels.screening import Groups, Rows, exact, lowered, pays
from components.sae.kernels.sparse import true_places

_TILE_ENTRIES = 1 << 24
"""Of products that are held at once: 64 MB."""
_CANDIDATES = 4
"""Times k of each token, where those of a batch are looked for."""
_CROWDED = 8
"""Times k: a token with more that may be among its strongest is looked at whole."""
_SAMPLED, _SPARE = 16, 1.3
"""One token of so many says over which bound the strongest of a batch are, so many times as many as are wanted."""
_ALIGNED = 16
"""Columns of the product's operands are a multiple of it."""
_ROUNDED = 1e-6
"""More than a division and a product in float32 change a number by, relative."""
_LEAST_NORM = 1e-20
"""So that the strength of a feature that writes nothing can be divided by it again."""


@torch.no_grad()
def strongest_of_rows(x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """For each token of x `[n, d_in]` the k features of largest `relu(x W_enc + b_enc)` times norms `[d_sae]`: pre-activations
    and indices, `[n, k]` each, in no order. Tokens with fewer positive ones get others as well, of any pre-activation."""
    d_sae = W_enc.shape[1]
    k = min(k, d_sae)
    if uses_triton(x):
        from components.sae.kernels.gpu import selection as gpu

        half = torch.is_autocast_enabled(x.device.type)
        rows = in_bfloat16(W_enc).T if half else W_enc.T
        return gpu.strongest_of_rows(x.bfloat16() if half else x, rows, b_enc, norms, k)
    norms = None if norms is None else norms.clamp_min(_LEAST_NORM)
    products = _Products(x, W_enc, b_enc, norms)
    if not pays(x, d_sae, k):
        return products.strongest(slice(None), k)
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.long)
    tile, start = max(64, _TILE_ENTRIES // d_sae), 0
    for groups, error in products.screened(tile):
        whole = _screened_rows(products, groups, error, k, start, values, indices)
        rows = start + whole.nonzero().flatten()
        start += len(error)
        if 2 * len(rows) > len(error):  # here it does not help
            rows = torch.cat([rows, torch.arange(start, len(x))])
            start = len(x)
        if len(rows):
            values[rows], indices[rows] = products.strongest(rows, k)
        if start == len(x):
            break
    return values, indices


def _screened_rows(
    products: _Products, groups: Groups, error: Tensor, k: int, start: int, values: Tensor, indices: Tensor
) -> Tensor:
    """Fill in the strongest of a tile that begins with token `start`; which of its tokens are to be looked at whole instead."""
    tokens, features, _, crowded = groups.reaching(lowered(groups.bound(k), 2 * error), _CROWDED * k)
    before = exact(products.x[start : start + len(error)], products.W_enc.T, products.b_enc, tokens, features)
    strength = before if products.norms is None else before * products.norms[features]
    counts = torch.bincount(tokens, minlength=len(error))
    crowded |= counts < k  # what is not finite reaches nothing
    place = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[tokens]
    table = strength.new_full((len(error), max(k, int(counts.max()))), -torch.inf)
    entry = torch.zeros(table.shape, dtype=torch.long)
    table[tokens, place], entry[tokens, place] = strength, torch.arange(len(tokens))
    chosen = entry.gather(1, table.topk(k, dim=1, sorted=False).indices)[~crowded]
    kept = start + (~crowded).nonzero().flatten()
    values[kept], indices[kept] = before[chosen], features[chosen]
    return crowded


@torch.no_grad()
def strongest_of_batch(x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `n k` features of largest `relu(x W_enc + b_enc)` times norms over the whole batch: their pre-activations and places
    `token * d_sae + feature`, `[m]` each in the order of places, and the smallest strength among them that is over zero, 0
    where none is.

    A few times k of each token suffice to find them, unless all of a token's are among them: such tokens are looked at whole.
    """
    d_sae = W_enc.shape[1]
    count, most = min(k, d_sae) * len(x), min(d_sae, _CANDIDATES * k)
    products = _Products(x, W_enc, b_enc, norms.clamp_min(_LEAST_NORM))
    found = _screened_batch(products, count, most) if not uses_triton(x) and pays(x, d_sae, most) else None
    likely = _likely(products, count, most) if found is None else None
    if likely is not None:
        found = _candidates_of_batch(products, count, *likely)
        if _tied(found[2], count):
            found = None
    values, where, flat = found or _candidates_of_batch(products, count, *products.strongest(slice(None), most))
    flat = torch.relu(flat)
    chosen = flat.topk(min(count, len(flat)), sorted=False).indices
    chosen = chosen[where[chosen].argsort()]
    positive = flat[chosen]
    weakest = torch.where(positive > 0, positive, torch.inf).amin()
    return values[chosen], where[chosen], torch.where(weakest.isfinite(), weakest, torch.zeros_like(weakest))


_Candidates = tuple[Tensor, Tensor, Tensor]
"""Pre-activations, places and strengths, `[m]` each, among which are the strongest of a batch."""


def _likely(products: _Products, count: int, most: int) -> tuple[Tensor, Tensor] | None:
    """`products.strongest` of all tokens, -1 and feature 0 in place of what is no candidate because it is under a bound, over
    which there are count. A sample of the tokens suggests it; None where it misleads, and where this does not pay."""
    x, d_sae = products.x, products.W_enc.shape[1]
    n = len(x)
    if x.device.type != "cpu" or not _SAMPLED <= n <= _TILE_ENTRIES // d_sae:
        return None
    strengths = products.hold()
    some = strengths[::_SAMPLED].flatten()
    bound = some.topk(min(len(some), 1 + int(_SPARE * count * len(some) / strengths.numel())), sorted=False).values.amin()
    flat = true_places((strengths > bound).flatten())
    if not bound > 0 or len(flat) > n * most:
        return None
    tokens = flat // d_sae
    counts = torch.bincount(tokens, minlength=n)
    place = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[tokens]
    kept = place < most
    tokens, place, flat = tokens[kept], place[kept], flat[kept]
    values, indices = strengths.new_full((n, most), -1.0), torch.zeros(n, most, dtype=torch.long)
    values[tokens, place], indices[tokens, place] = strengths.flatten()[flat], flat - tokens * d_sae
    crowded = (counts > most).nonzero().flatten()
    values[crowded], indices[crowded] = strengths[crowded].topk(most, dim=1, sorted=False)
    if int((values > (1 + _ROUNDED) * bound).sum()) < count:
        return None
    return values / products.norms_of(indices), indices


def _tied(strengths: Tensor, count: int) -> bool:
    """Whether there is a choice which of these are the strongest, as of tokens that are the same: it is left to one way of
    choosing, whose bits stay."""
    return int((strengths >= strengths.topk(count, sorted=False).values.amin()).sum()) > count


def _candidates_of_batch(products: _Products, count: int, before: Tensor, indices: Tensor) -> _Candidates:
    """before, indices `[n, most]`: of each token its strongest."""
    d_sae, most = products.W_enc.shape[1], indices.shape[1]
    strengths = torch.relu(before) * products.norms_of(indices)
    places = indices + d_sae * torch.arange(len(before), device=before.device)[:, None]
    least = strengths.flatten().topk(count, sorted=False).values.amin()
    full = strengths.amin(dim=1) > least
    if most == d_sae or not Asked(full).answer():
        return before.flatten(), places.flatten(), strengths.flatten()
    values, where, flat = products.over(full.nonzero().flatten(), least)
    return (
        torch.cat([before[~full].flatten(), values]),
        torch.cat([places[~full].flatten(), where]),
        torch.cat([strengths[~full].flatten(), flat]),
    )


def _screened_batch(products: _Products, count: int, most: int) -> _Candidates | None:
    """None where screening does not tell enough of them apart."""
    x, d_sae = products.x, products.W_enc.shape[1]
    tile, start = max(64, _TILE_ENTRIES // d_sae), 0
    found, bounds, errors, crowded = [], [], [], []
    for groups, error in products.screened(tile):
        bound = groups.bound(most)
        tokens, features, rounded, full = groups.reaching(bound, 2 * most)
        found.append((tokens + start, features, rounded))
        bounds.append(bound)
        errors.append(error)
        crowded.append(full)
        start += len(error)
    tokens, features, rounded = (torch.cat([part[place] for part in found]) for place in range(3))
    error = torch.cat(errors)
    if len(rounded) < count:
        return None
    # So many are known to reach it; each may be less than its product by the error of its token.
    sure = rounded.float().topk(count).values[-1]
    needed = lowered(sure, error + error.max())
    whole = torch.cat(crowded) | (torch.cat(bounds) > needed)
    if not bool(sure > 0) or 4 * int(whole.sum()) > len(x):
        return None
    kept = (rounded >= needed[tokens]) & ~whole[tokens]
    tokens, features = tokens[kept], features[kept]
    before = exact(x, products.W_enc.T, products.b_enc, tokens, features)
    strengths, places = before * products.norms_of(features), tokens * d_sae + features
    rows = whole.nonzero().flatten()
    if len(rows) == 0:
        return before, places, strengths
    others = products.over(rows, lowered(sure, error.max()).float())
    return torch.cat([before, others[0]]), torch.cat([places, others[1]]), torch.cat([strengths, others[2]])


class _Products:
    """`x W_enc + b_enc` times norms, tile by tile."""

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None) -> None:
        self.x, self.W_enc, self.b_enc, self.norms = x, W_enc, b_enc, norms
        self._rows: Tensor | None = None
        self._held: Tensor | None = None

    def hold(self) -> Tensor:
        """The products of all tokens, of which there is one tile, for this and for `strongest`."""
        (self._held,) = self.tiles(self.x)
        return self._held

    def norms_of(self, features: Tensor) -> Tensor:
        assert self.norms is not None
        return self.norms[features]

    def screened(self, tile: int) -> Iterator[tuple[Groups, Tensor]]:
        rows = Rows.of(self.W_enc.T, self.b_enc, self.norms, self.x.mean(dim=0))
        for products, error in rows.products(self.x, tile):
            yield Groups.of(products), error

    def tiles(self, x: Tensor) -> Iterator[Tensor]:
        """One product for strengths, bias and norms included: no further pass over `[n, d_sae]`."""
        W_enc = self.W_enc
        d_in, d_sae = W_enc.shape
        if self._rows is None:
            rows = W_enc.new_zeros(d_sae, -(-(d_in + 1) // _ALIGNED) * _ALIGNED)
            rows[:, :d_in], rows[:, d_in] = W_enc.T, self.b_enc
            self._rows = rows if self.norms is None else rows.mul_(self.norms[:, None])
        padded = torch.cat([x, x.new_ones(len(x), 1), x.new_zeros(len(x), self._rows.shape[1] - d_in - 1)], dim=1)
        for part in padded.split(max(64, _TILE_ENTRIES // d_sae)):
            if torch.is_autocast_enabled(part.device.type) and part.is_cuda:  # sums stay in float32
                yield torch.mm(part.bfloat16(), self._rows.T.bfloat16(), out_dtype=torch.float32)
            else:
                yield part @ self._rows.T

    def strongest(self, rows: Tensor | slice, k: int) -> tuple[Tensor, Tensor]:
        """Pre-activations and indices of the k strongest features of these tokens, `[rows, k]` each."""
        if uses_triton(self.x):
            return strongest_of_rows(self.x[rows], self.W_enc, self.b_enc, self.norms, k)
        tiles = self.tiles(self.x[rows]) if self._held is None else [self._held[rows]]
        found = [part.topk(k, dim=1, sorted=False) for part in tiles]
        strengths, indices = torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
        return strengths if self.norms is None else strengths / self.norms[indices], indices

    def over(self, rows: Tensor, bound: Tensor) -> _Candidates:
        """All of these tokens `[r]` whose strength is at least `bound`, and over zero."""
        found, start, d_sae = [], 0, self.W_enc.shape[1]
        for part in self.tiles(self.x[rows]):
            tokens, features = ((part >= bound) & (part > 0)).nonzero(as_tuple=True)
            strengths = part[tokens, features]
            found.append((strengths / self.norms_of(features), rows[start + tokens] * d_sae + features, strengths))
            start += len(part)
        values, places, strengths = (torch.cat([part[place] for part in found]) for place in range(3))
        return values, places, strengths
