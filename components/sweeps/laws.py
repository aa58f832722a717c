"""Sums of power laws, fitted to measured losses: `L = sum_t exp(X_t theta_t)`, each term a product of powers of what varies.

`L = a + b C^-c` is one, the joint law in features and tokens of Hoffmann et al. 2022 (arXiv 2203.15556), `E + A n^-alpha +
B D^-beta`, another, and so is the law in features and sparsity of Gao et al. 2024 (arXiv 2406.04093). Residuals are of
`log L` under Huber's loss, so that one bad training does not bend the law; Levenberg-Marquardt from many starts at once, as
the many fits of a bootstrap are, which a solver that takes one problem after another would take minutes for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

STARTS = 96
COVERAGE = 0.9
"""Of every interval."""
_HUBER = 1.345
"""Where Huber's loss turns from squares to absolute values, in standard deviations: 95% efficient under normal noise."""
_RESCALED = 4
_LARGEST = 60.0
"""Of a parameter's size, around the data's mean: a term that is not there goes to zero, and need not go on for ever."""


@dataclass(frozen=True)
class Law:
    """terms: by name, the columns that each is linear in, in logarithms; `1` is the constant, `kn` the product of two."""

    terms: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        return [f"{term}.{column}" for term, columns in self.terms.items() for column in columns]

    def designs(self, logs: Mapping[str, Array]) -> list[Array]:
        """`[N, columns]` per term. logs: of each variable, `[N]`."""
        size = len(next(iter(logs.values())))
        return [np.stack([_column(name, logs, size) for name in columns], axis=1) for columns in self.terms.values()]

    def log_loss(self, parameters: Array, logs: Mapping[str, Array]) -> Array:
        """`[..., N]` for parameters `[..., P]`, in the order of `names`."""
        return _forward(self.designs(logs), np.atleast_1d(parameters))[0]


POWER = Law({"floor": ("1",), "compute": ("1", "C")})
"""`L = a + b C^-c`."""


@dataclass(frozen=True)
class Fitted:
    law: Law
    parameters: Array
    """`[P]`, in the order of `law.names`."""
    draws: Array
    """`[draws, P]`: of the bootstrap."""
    residuals: Array
    """`[N]`: log of measured over fitted, spread as those of a law with no parameters to fit would be."""

    def __getitem__(self, name: str) -> float:
        return float(self.parameters[self.law.names.index(name)])

    def drawn(self, name: str) -> Array:
        return self.draws[:, self.law.names.index(name)]


def interval(drawn: Array, freedom: int) -> tuple[float, float]:
    """90%, by percentiles that are moved out as Student's t is from the normal (Hesterberg 2015): few points bend a law more
    than their residuals say."""
    from scipy import stats

    tail = float(stats.norm.cdf(stats.t.ppf((1 - COVERAGE) / 2, freedom)))
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def fit(law: Law, logs: Mapping[str, Array], loss: Array, draws: int = 400, seed: int = 0) -> Fitted:
    """loss `[N]`, logs of the variables `[N]`. The bootstrap draws residuals: the points of a grid are chosen, not drawn."""
    (parameters,), (inner,), (residuals,), transform, centred = _points(law, logs, loss[None], seed)
    if draws == 0:
        return Fitted(law, parameters, np.empty((0, len(parameters))), residuals)
    generator = np.random.default_rng(seed)
    resampled = residuals[generator.integers(len(loss), size=(draws, len(loss)))]
    fitted = _forward(centred, inner)[0]
    again = _robust(centred, fitted + resampled, np.repeat(inner[None], draws, axis=0))
    return Fitted(law, parameters, again @ transform.T, residuals)


def fit_many(law: Law, logs: Mapping[str, Array], losses: Array, draws: int, seed: int = 0) -> tuple[Array, Array]:
    """`fit` of many sets of losses `[M, N]` at the same points: parameters `[M, P]` and their bootstrap `[M, draws, P]`."""
    parameters, inner, residuals, transform, centred = _points(law, logs, losses, seed)
    generator = np.random.default_rng(seed)
    many, size = losses.shape
    picks = generator.integers(size, size=(many, draws, size))
    resampled = np.take_along_axis(residuals[:, None, :].repeat(draws, axis=1), picks, axis=2)
    targets = _forward(centred, inner)[0][:, None, :] + resampled
    again = _robust(centred, targets.reshape(many * draws, size), inner.repeat(draws, axis=0))
    return parameters, (again @ transform.T).reshape(many, draws, -1)


def _points(law: Law, logs: Mapping[str, Array], losses: Array, seed: int) -> tuple[Array, Array, Array, Array, list[Array]]:
    """Parameters `[M, P]`, the same around the data's mean, residuals `[M, N]`, from the second to the first, the designs."""
    centred = law.designs({name: values - values.mean() for name, values in logs.items()})
    transform = _block_diagonal([_solved(raw, around) for raw, around in zip(law.designs(logs), centred, strict=True)])
    targets = np.log(losses)
    many, size = targets.shape
    starts = _starts(law, targets.mean(axis=1), np.random.default_rng(seed))  # [M, STARTS, P]
    flat = starts.reshape(many * STARTS, -1)
    found = _marquardt(centred, targets.repeat(STARTS, axis=0), flat, np.full(len(flat), np.inf), steps=60)
    cost = np.square(targets.repeat(STARTS, axis=0) - _forward(centred, found)[0]).sum(axis=1).reshape(many, STARTS)
    best = found.reshape(many, STARTS, -1)[np.arange(many), np.nan_to_num(cost, nan=np.inf).argmin(axis=1)]
    inner = _robust(centred, targets, best)
    residuals = targets - _forward(centred, inner)[0]
    spread = np.sqrt(size / max(1, size - inner.shape[1]))
    residuals = (residuals - residuals.mean(axis=1, keepdims=True)) * spread
    return inner @ transform.T, inner, residuals, transform, centred


def _robust(designs: list[Array], targets: Array, starts: Array) -> Array:
    """Least squares, and from there Huber's loss at the scale of what is left, which is found anew as outliers come out."""
    found = _marquardt(designs, targets, starts, np.full(len(starts), np.inf))
    freedom = targets.shape[1] / max(1, targets.shape[1] - starts.shape[1])
    for _ in range(_RESCALED):
        left = np.abs(targets - _forward(designs, found)[0])
        scale = 1.4826 * np.median(left, axis=1) * np.sqrt(freedom)
        found = _marquardt(designs, targets, found, _HUBER * np.maximum(scale, 1e-9))
    return found


def _forward(designs: list[Array], parameters: Array) -> tuple[Array, list[Array]]:
    """log of the sum `[..., N]`, and each term's share of it."""
    logs, start = [], 0
    for design in designs:
        stop = start + design.shape[1]
        logs.append(parameters[..., start:stop] @ design.T)
        start = stop
    largest = np.maximum.reduce(logs)
    powers = [np.exp(term - largest) for term in logs]
    total = np.sum(powers, axis=0)
    return largest + np.log(total), [power / total for power in powers]


def _marquardt(designs: list[Array], targets: Array, starts: Array, huber: Array, steps: int = 150) -> Array:
    """Parameters `[B, P]` of B problems at the same points, targets `[B, N]`; huber `[B]`: the residual from which the loss is
    linear."""
    parameters, damping = starts.copy(), np.full(len(starts), 1e-2)
    limit = huber[:, None]

    def costs(at: Array, which: NDArray[np.intp]) -> tuple[Array, Array, list[Array]]:
        value, shares = _forward(designs, at)
        residual = targets[which] - value
        size = np.abs(residual)
        edge = limit[which]
        linear = np.where(np.isfinite(edge), edge, 0.0) * (2 * size - np.where(np.isfinite(edge), edge, 0.0))
        return np.where(size <= edge, size**2, linear).sum(axis=1), residual, shares

    active = np.arange(len(starts))
    cost, residual, shares = costs(parameters, active)
    patience = np.zeros(len(starts), dtype=int)
    for _ in range(steps):
        here = parameters[active]
        edge = limit[active]
        weights = np.minimum(1.0, edge / np.maximum(np.abs(residual), 1e-300))
        jacobian = np.concatenate(
            [share[:, :, None] * design for share, design in zip(shares, designs, strict=True)], axis=2
        )  # [B, N, P]
        weighted = jacobian * weights[:, :, None]
        normal = np.einsum("bnp,bnq->bpq", weighted, jacobian)
        gradient = np.einsum("bnp,bn->bp", weighted, residual)
        diagonal = np.einsum("bpp->bp", normal)
        places = np.arange(normal.shape[1])
        normal[:, places, places] += damping[active, None] * diagonal + 1e-12
        step = np.clip(np.linalg.solve(normal, gradient[:, :, None])[:, :, 0], -2.0, 2.0)
        moved = np.clip(here + step, -_LARGEST, _LARGEST)
        new_cost, new_residual, new_shares = costs(moved, active)
        better = new_cost < cost[active]
        gain = np.where(better, (cost[active] - new_cost) / np.maximum(cost[active], 1e-300), 0.0)
        parameters[active] = np.where(better[:, None], moved, here)
        cost[active] = np.where(better, new_cost, cost[active])
        damping[active] = np.clip(np.where(better, damping[active] / 4, damping[active] * 6), 1e-9, 1e9)
        residual = np.where(better[:, None], new_residual, residual)
        shares = [np.where(better[:, None], new, old) for new, old in zip(new_shares, shares, strict=True)]
        patience[active] = np.where(gain > 1e-7, 0, patience[active] + 1)
        going = patience[active] < 6
        if not going.any():
            break
        active, residual, shares = active[going], residual[going], [share[going] for share in shares]
    return parameters


def _starts(law: Law, levels: Array, generator: np.random.Generator) -> Array:
    """`[M, STARTS, P]`: any share of the loss for each term, falling with exponents from 0.02 to 1. levels `[M]`: mean log
    loss."""
    parts = []
    shares = generator.dirichlet(np.ones(len(law.terms)), size=STARTS)
    for place, columns in enumerate(law.terms.values()):
        for name in columns:
            if name == "1":
                parts.append(levels[:, None] + np.log(shares[:, place] + 1e-3)[None, :])
            elif name == "kn":
                parts.append(np.broadcast_to(generator.normal(0, 0.05, STARTS), (len(levels), STARTS)))
            else:
                parts.append(np.broadcast_to(-np.exp(generator.uniform(np.log(0.02), 0.0, STARTS)), (len(levels), STARTS)))
    return np.stack(parts, axis=2)


def _column(name: str, logs: Mapping[str, Array], size: int) -> Array:
    return np.ones(size) if name == "1" else np.prod([logs[variable] for variable in name], axis=0)


def _solved(design: Array, target: Array) -> Array:
    return np.asarray(np.linalg.lstsq(design, target, rcond=None)[0], dtype=np.float64)


def _block_diagonal(blocks: list[Array]) -> Array:
    whole = np.zeros((sum(len(block) for block in blocks),) * 2)
    start = 0
    for block in blocks:
        stop = start + len(block)
        whole[start:stop, start:stop] = block
        start = stop
    return whole
