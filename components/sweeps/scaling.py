"""What a sweep says of size, length, sparsity and learning rate: laws with 90% bootstrap intervals, and the optimum they give.

The joint law is `L(n, D, k) = exp(zeta + eta log k) + exp(alpha + beta_k log k + beta_n log n + gamma log k log n) +
B D^-beta n^delta`: that of Gao et al. 2024 in features n and active features k, with the term in tokens D of Hoffmann et al.
2022, where a larger coder may need more of them: n^delta is fitted where a sweep has two settings for each parameter. What it
does not vary is left out. L is the normalised MSE on held-out text, of each size, length and k at its best
learning rate (`least_loss`).

Compute is dense: C = n D f, with f FLOPs per feature and token. Then the optimum at a fixed k is a power law of C in each of
features, tokens and loss (above its floor). The sparse FLOPs of the same training are not proportional to n D, and stand
beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.run.config import RunConfig, flattened
from components.settings import Record, UserError
from components.sweeps.laws import POWER, Array, Fitted, Law, fit, interval
from components.sweeps.learning_rate import BestRate, best_learning_rate, least_loss
from components.sweeps.record import SweepPoint, SweepRecord

DIALS = ("sae.d_sae", "sae.expansion_factor", "sae.k", "training.tokens", "training.learning_rate")
"""Fields that the laws are in. Of any other that a sweep varies, the points with the configuration's own value count."""
DRAWS = 400
_LEAST_LEVELS = 3
"""Of features and of tokens: two would tell no floor from a slope."""
_LEAST_FOR_FRONTIER = 6
_SETTINGS_PER_PARAMETER = 2
TRIED_BEYOND = 3.0
"""How far the trial extrapolates: the law of what costs at most a third of the dearest setting is asked for the others."""
_WHOLE_STEPS = 1.01
"""Of compute that is as much but for lengths of whole steps."""


class Estimate(Record):
    """A value and its 90% interval."""

    value: float
    low: float
    high: float


class Power(Record):
    """`coefficient * C^exponent`, C in dense FLOPs."""

    coefficient: float
    exponent: Estimate


class Frontier(Record):
    """`L = floor + coefficient * C^-exponent`, C in dense FLOPs."""

    floor: Estimate
    coefficient: float
    exponent: Estimate


class Trial(Record):
    """The law of a sweep's cheaper settings against its dearer ones, which it has not seen: how far to trust the law of all of
    them beyond all of them."""

    fitted: int
    """Settings that cost at most a third of the dearest one."""
    foretold: int
    """The others."""
    mean: float
    """Of the log of measured over foretold loss: below zero, the law says too much."""
    spread: float
    """Root of the mean square of the same."""
    corrects: bool
    """Whether what is foretold beyond the sweep is moved by the mean, as a forecast is by its bias in a backtest: where the
    cheaper settings are at least two for each parameter of their law."""


class Scaling(Record):
    """The laws of one sweep at one k, as they are printed and kept."""

    k: int | None
    points: int
    """Trainings that they rest on: the best learning rate of each setting."""
    law: dict[str, Estimate]
    """Parameters of the joint law, term by term: `features.n` is beta_n, `features.kn` gamma, `steps.D` minus beta."""
    residual: float
    """Standard deviation of the log of measured over fitted loss."""
    trial: Trial | None = None
    """None where the cheaper settings are too few for a law of their own."""
    frontier: Frontier | None = None
    """That the joint law gives; None where the sweep varies features or tokens too little."""
    observed_frontier: Frontier | None = None
    """The same law through the trainings that none with less compute beats, without the joint law."""
    features: Power | None = None
    """The compute-optimal number of features."""
    steps: Power | None = None
    """The compute-optimal number of steps, at the sweep's batch size."""
    learning_rate: BestRate


@dataclass(frozen=True)
class Fit:
    """The laws with all that predictions need."""

    points: list[SweepPoint]
    """The best learning rate of each setting."""
    everything: list[SweepPoint]
    law: Fitted
    k: int | None
    learning_rate: BestRate
    trial: Trial | None = None

    @property
    def flops_per_feature(self) -> float:
        """Dense FLOPs per feature and token."""
        one = self.points[0]
        return one.flops_dense / (one.features * one.tokens)

    @property
    def varies_tokens(self) -> bool:
        return "steps" in self.law.law.terms

    @property
    def has_optimum(self) -> bool:
        """Whether the law knows both what more features and what more tokens are worth."""
        return self.varies_tokens and "features" in self.law.law.terms

    def log_loss(self, features: Any, tokens: Any, parameters: Array | None = None) -> Array:
        """At this fit's k; `[..., N]` for parameters `[..., P]`, of the fit itself where none are given."""
        n, d = np.broadcast_arrays(np.atleast_1d(np.asarray(features, float)), np.atleast_1d(np.asarray(tokens, float)))
        logs = {"n": np.log(n), "D": np.log(d), "k": np.full(n.shape, np.log(self.k or 1))}
        return self.law.law.log_loss(self.law.parameters if parameters is None else parameters, logs)

    @property
    def freedom(self) -> int:
        return max(1, len(self.points) - len(self.law.parameters))

    def exchange(self, parameters: Array) -> tuple[Array, Array, Array, Array, Array]:
        """log A, alpha, log B, beta, delta of `A n^-alpha + B D^-beta n^delta` at this fit's k, of parameters `[..., P]`."""
        names, log_k = self.law.law.names, np.log(self.k or 1)

        def of(name: str) -> Array:
            return parameters[..., names.index(name)] if name in names else np.zeros(parameters.shape[:-1])

        log_a = of("features.1") + of("features.k") * log_k
        alpha = -(of("features.n") + of("features.kn") * log_k)
        return log_a, alpha, of("steps.1"), -of("steps.D"), of("steps.n")

    def optimum(self, flops: float, parameters: Array | None = None) -> tuple[Array, Array]:
        """Features and tokens that leave the least loss for so many dense FLOPs."""
        log_a, alpha, log_b, beta, delta = self.exchange(self.law.parameters if parameters is None else parameters)
        budget, rising = np.log(flops / self.flops_per_feature), np.maximum(beta + delta, 1e-6)
        log_g = (np.log(np.maximum(alpha, 1e-6)) + log_a - np.log(rising) - log_b) / (alpha + rising)
        log_n = log_g + beta / (alpha + rising) * budget
        return np.exp(log_n), np.exp(budget - log_n)

    def tokens_for(self, features: float) -> float:
        """For which this number of features is the compute-optimal one."""
        log_a, alpha, log_b, beta, delta = self.exchange(self.law.parameters)
        return float(np.exp((np.log(beta + delta) + log_b - np.log(alpha) - log_a + (alpha + delta) * np.log(features)) / beta))

    def summary(self) -> Scaling:
        names, values = self.law.law.names, self.law.parameters
        return Scaling(
            k=self.k,
            points=len(self.points),
            law={name: self._estimate(values[place], self.law.draws[:, place]) for place, name in enumerate(names)},
            residual=float(np.std(self.law.residuals)),
            trial=self.trial,
            learning_rate=self.learning_rate,
            observed_frontier=_through(frontier_points(self.points)),
            **(self._optimal() if self.has_optimum else {}),
        )

    def _estimate(self, value: Any, drawn: Array) -> Estimate:
        low, high = interval(drawn, self.freedom)
        return Estimate(value=float(value), low=low, high=high)

    def _optimal(self) -> dict[str, Any]:
        names = self.law.law.names
        at, drawn = self.law.parameters, self.law.draws
        (_, alpha, _, beta, delta), (_, alphas, _, betas, deltas) = self.exchange(at), self.exchange(drawn)
        both, boths = alpha + beta + delta, alphas + betas + deltas
        log_k = np.log(self.k or 1)

        def floor(parameters: Array) -> Array:
            slope = parameters[..., names.index("floor.k")] * log_k if "floor.k" in names else 0.0
            return np.exp(parameters[..., names.index("floor.1")] + slope)

        features, tokens = (float(found) for found in self.optimum(1.0))
        excess = float(np.exp(self.log_loss(features, tokens))[0] - floor(at))
        size = self.points[0].batch_size
        return {
            "frontier": Frontier(
                floor=self._estimate(float(floor(at)), floor(drawn)),
                coefficient=excess,
                exponent=self._estimate(alpha * beta / both, alphas * betas / boths),
            ),
            "features": Power(coefficient=features, exponent=self._estimate(beta / both, betas / boths)),
            "steps": Power(
                coefficient=tokens / size, exponent=self._estimate((alpha + delta) / both, (alphas + deltas) / boths)
            ),
        }


def fit_sweep(record: SweepRecord, config: RunConfig, draws: int = DRAWS) -> Fit:
    """config: says which k, and which of the points where the sweep varies more than the laws know of. A UserError for too few
    points."""
    everything = usable_points(record, config)
    by_setting: dict[tuple[Any, ...], list[SweepPoint]] = {}
    for point in everything:
        by_setting.setdefault((point.features, point.tokens, point.k), []).append(point)
    settings = [by_setting[setting] for setting in sorted(by_setting, key=str)]
    fitted = _fitted(settings, draws)
    points = [min(setting, key=_loss) for setting in settings]
    return Fit(points, everything, fitted, _chosen_k(points, config), best_learning_rate(everything, draws), _trial(settings))


def _fitted(settings: Sequence[Sequence[SweepPoint]], draws: int) -> Fitted:
    """settings: each with its trainings, which differ in the learning rate."""
    points = [min(setting, key=_loss) for setting in settings]
    law = _law(points)
    needed = len(law.names) + 1
    if len(points) < needed:
        raise UserError(
            f"--sweep: {len(points)} of its settings have finished (of each size, length and k one counts); the law "
            f"that fits them has {len(law.names)} parameters and needs {needed}"
        )
    return fit(law, _logs(points), np.array([least_loss(setting) for setting in settings]), draws)


def _trial(settings: Sequence[Sequence[SweepPoint]]) -> Trial | None:
    dearest = max(setting[0].flops_dense for setting in settings)
    parts: tuple[list[Sequence[SweepPoint]], list[Sequence[SweepPoint]]] = [], []
    for setting in settings:
        parts[TRIED_BEYOND * setting[0].flops_dense > _WHOLE_STEPS * dearest].append(setting)
    cheaper, dearer = parts
    try:
        fitted = _fitted(cheaper, draws=0)
    except UserError:
        return None
    foretold = fitted.law.log_loss(fitted.parameters, _logs([setting[0] for setting in dearer]))
    missed = np.log([least_loss(setting) for setting in dearer]) - foretold
    return Trial(
        fitted=len(cheaper),
        foretold=len(dearer),
        mean=float(np.mean(missed)),
        spread=float(np.sqrt(np.mean(np.square(missed)))),
        corrects=len(cheaper) >= _SETTINGS_PER_PARAMETER * len(fitted.law.names),
    )


def usable_points(record: SweepRecord, config: RunConfig) -> list[SweepPoint]:
    values = flattened(config.model_dump(mode="json"))
    points = [point for point in record.finished if _loss(point) > 0]
    for field, taken in record.grid.items():
        if field in DIALS or len(taken) == 1:
            continue
        wanted = config.sae.architecture if field == "sae.architecture" else values.get(field)
        points = [point for point in points if point.values[field] == wanted]
        if not points:
            raise UserError(
                f"--sweep: it varies {field} ({', '.join(map(str, taken))}), and CONFIG's {wanted} is none of its values"
            )
    if len({(point.hook_point, point.batch_size) for point in points}) > 1:
        raise UserError("--sweep: the laws are of one hook point and one batch size, and its points have several")
    return points


def _law(points: Sequence[SweepPoint]) -> Law:
    features, tokens, ks = (_levels(points, name) for name in ("features", "tokens", "k"))
    if features < _LEAST_LEVELS:
        raise UserError(f"--sweep: the laws need at least {_LEAST_LEVELS} numbers of features; it has {features} that finished")
    if 1 < tokens < _LEAST_LEVELS:
        raise UserError(f"--sweep: the laws need one length of training or at least {_LEAST_LEVELS}; it has {tokens}")
    terms: dict[str, tuple[str, ...]] = {"floor": ("1", "k") if ks >= _LEAST_LEVELS else ("1",)}
    terms["features"] = ("1", "n", "k", "kn") if ks > 1 else ("1", "n")
    if tokens > 1:
        terms["steps"] = ("1", "D")
        wider = Law({**terms, "steps": ("1", "D", "n")})
        if len(points) >= _SETTINGS_PER_PARAMETER * len(wider.names):
            return wider
    return Law(terms)


def _levels(points: Sequence[SweepPoint], name: str) -> int:
    return len({getattr(point, name) for point in points})


def _chosen_k(points: Sequence[SweepPoint], config: RunConfig) -> int | None:
    """The configuration's, which must lie within the sweep's where that varies it."""
    swept = sorted({point.k for point in points if point.k is not None})
    wanted: int | None = getattr(config.sae, "k", None)
    if not swept:
        return None
    if wanted is None or not swept[0] <= wanted <= swept[-1]:
        raise UserError(f"sae.k: {wanted} is outside of what the sweep has tried, {swept[0]} to {swept[-1]}")
    return wanted


def _logs(points: Sequence[SweepPoint]) -> Mapping[str, Array]:
    found = {"n": "features", "D": "tokens", "k": "k"}
    return {name: np.log([float(getattr(point, field) or 1) for point in points]) for name, field in found.items()}


def _loss(point: SweepPoint) -> float:
    return point.loss if point.loss is not None else 0.0


def frontier_points(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Those that none with as little compute beats, cheapest first."""
    found: list[SweepPoint] = []
    for point in sorted(points, key=lambda one: (one.flops_dense, _loss(one))):
        if not found or _loss(point) < _loss(found[-1]):
            found.append(point)
    return found


def _through(points: Sequence[SweepPoint]) -> Frontier | None:
    if len(points) < _LEAST_FOR_FRONTIER:
        return None
    logs = {"C": np.log([float(point.flops_dense) for point in points])}
    found = fit(POWER, logs, np.array([_loss(point) for point in points]), DRAWS)
    freedom = len(points) - len(found.parameters)

    def estimate(value: float, drawn: Array) -> Estimate:
        low, high = interval(drawn, freedom)
        return Estimate(value=value, low=low, high=high)

    return Frontier(
        floor=estimate(float(np.exp(found["floor.1"])), np.exp(found.drawn("floor.1"))),
        coefficient=float(np.exp(found["compute.1"])),
        exponent=estimate(-found["compute.C"], -found.drawn("compute.C")),
    )
