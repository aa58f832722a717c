"""From the laws of a sweep to the configuration to train: for a budget, or for a number of features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from components.planning.place import GPUS
from components.run.config import parse_config
from components.run.estimate import dense_flops, sparse_flops
from components.run.specification import Specification
from components.settings import Record, UserError
from components.sweeps.laws import Array, interval
from components.sweeps.scaling import TRIED_BEYOND, Estimate, Fit, frontier_points

FURTHEST = 10.0
"""How many times the sweep's largest budget a recommendation may be for."""
_DIGITS = 3
"""Digits that are kept of a recommended number."""


class Recommendation(Record):
    features: int
    tokens: int
    steps: int
    learning_rate: float
    k: int | None
    flops_dense: float
    flops_sparse: float | None
    """Of the same training, decoder and gradients over k active features alone."""
    loss: Estimate
    """Normalised MSE, `1 - explained_variance`, that one training will leave: the laws' interval and its own scatter."""
    extrapolates: dict[str, float]
    """What lies outside of the sweep, as a multiple of its nearest end; empty within it."""
    law_alone: int | None = None
    """Features that the law would have, where that is further beyond the sweep than the budget is."""
    learning_rate_said: str
    set: dict[str, Any]
    """Fields of the configuration to train, by their dotted names."""
    assumed: str | None = None
    """Of the budget, where it is in hours of a GPU."""


def flops_of(gpu: str, hours: float, utilisation: float, autocast: str) -> tuple[float, str]:
    """A budget in FLOPs, and what is assumed in it. A UserError for a GPU that is not listed."""
    if gpu.lower() not in GPUS:
        raise UserError(f"--gpu: '{gpu}' is not known; accepted are {', '.join(GPUS)}, or give --flops")
    peak = GPUS[gpu.lower()].peaks[autocast]
    said = (
        f"{hours:g} hours of one {gpu.lower()} at {utilisation:.0%} of {peak / 1e12:g} TFLOP/s "
        f"(training.autocast {autocast}); the share is assumed and not measured (--utilisation)"
    )
    return hours * 3600 * peak * utilisation, said


def recommend(
    base: Specification, fit: Fit, flops: float | None = None, features: int | None = None, assumed: str | None = None
) -> Recommendation:
    """flops: dense ones, of which the best is made, with neither features nor tokens further beyond the sweep than the budget;
    or features, which are trained for as long as is best for so many.

    A UserError where the fit does not carry it: beyond `FURTHEST` times the sweep's largest budget, or with an interval that is
    wider than all that the sweep's own compute has gained.
    """
    assert (flops is None) != (features is None)
    _require_same(base, fit)
    if not fit.has_optimum and (flops is not None or fit.varies_tokens):
        raise UserError(
            "--flops: the sweep has one length of training; it says what features are worth, and not what steps are"
        )
    _require_falling(fit)
    law_alone: float | None = None
    if flops is not None:
        law_alone = float(fit.optimum(flops)[0])
        wanted = _held(fit, law_alone, flops)
    elif fit.has_optimum:
        wanted, tokens = float(features or 0), fit.tokens_for(float(features or 0))
    else:
        wanted, tokens = float(features or 0), float(fit.points[0].tokens)
    size = base.config.training.batch_size
    n = max(1, round(wanted) if flops is None else _rounded(wanted))
    steps = max(1, round((flops / fit.flops_per_feature / n if flops is not None else tokens) / size))
    rate = _rounded_rate(fit.learning_rate.at(n, steps * size))
    chosen = {"sae.d_sae": n, "training.tokens": steps * size, "training.learning_rate": rate}
    run = with_values(base, chosen)
    spent = float(dense_flops(run))
    beyond = _beyond(fit, n, steps * size, spent)
    if beyond.get("flops", 1.0) > FURTHEST:
        largest = max(point.flops_dense for point in fit.everything)
        raise UserError(
            f"{'--flops' if features is None else '--features'}: {spent:.3g} FLOPs are {spent / largest:.3g} times the sweep's "
            f"largest budget, {largest:.3g}; accepted are at most {FURTHEST:g} times"
        )
    loss = predicted(fit, n, steps * size)
    _require_carried(fit, loss)
    return Recommendation(
        features=n,
        tokens=steps * size,
        steps=steps,
        learning_rate=rate,
        k=fit.k,
        flops_dense=spent,
        flops_sparse=None if fit.k is None else sparse_flops(run, fit.k),
        loss=loss,
        extrapolates=beyond,
        law_alone=None if law_alone in (None, wanted) else _rounded(law_alone),
        learning_rate_said=fit.learning_rate.said,
        set=chosen,
        assumed=assumed,
    )


def _held(fit: Fit, features: float, flops: float) -> float:
    """Features with which neither they nor the tokens are more times the sweep's largest than the budget is: what more of the
    one in place of the other is worth, the law knows least where nothing near has been trained."""
    most_features, most_tokens = (max(getattr(point, name) for point in fit.points) for name in ("features", "tokens"))
    times = max(1.0, flops / fit.flops_per_feature / max(point.features * point.tokens for point in fit.points))
    fewest = flops / fit.flops_per_feature / (times * most_tokens)
    return min(max(features, fewest), times * most_features)


def predicted(fit: Fit, features: int, tokens: int, seed: int = 0) -> Estimate:
    """The loss of one training: its interval holds the laws' uncertainty and the scatter of a training around them. Beyond the
    sweep's compute the trial tells (`Trial`): its mean moves the loss, up to as far beyond as it went, and its spread, in
    proportion to the logarithm, widens the interval."""
    generator = np.random.default_rng(seed)
    laws: Array = fit.log_loss(features, tokens, fit.law.draws)[..., 0]
    scattered = laws + generator.choice(fit.law.residuals, size=len(laws))
    value = float(fit.log_loss(features, tokens)[0])
    if fit.trial is not None:
        beyond = np.log(features * tokens / max(point.features * point.tokens for point in fit.points))
        share = max(0.0, float(beyond / np.log(TRIED_BEYOND)))
        moved = min(1.0, share) * fit.trial.mean if fit.trial.corrects else 0.0
        value += moved
        scattered += moved + fit.trial.spread * share * generator.standard_normal(len(laws))
    low, high = interval(np.exp(scattered), fit.freedom)
    return Estimate(value=float(np.exp(value)), low=low, high=high)


def with_values(base: Specification, values: Mapping[str, Any]) -> Specification:
    """The configuration with these fields of `sae` and `training`; a size replaces the base's."""
    tree = base.config.model_dump(mode="json")
    tree["sae"].pop("expansion_factor", None)
    for field, value in values.items():
        section, _, name = field.partition(".")
        tree[section][name] = value
    parsed = parse_config(tree)
    return base.varied(base.config.model_copy(update={"sae": parsed.sae, "training": parsed.training}))


def _require_same(base: Specification, fit: Fit) -> None:
    for point in fit.points[:1]:
        if (point.d_in, point.hook_point, point.architecture) != (base.d_in, base.hook_point, base.config.sae.architecture):
            raise UserError(
                f"--sweep: it is of {point.architecture} at {point.hook_point} of width {point.d_in}, and CONFIG of "
                f"{base.config.sae.architecture} at {base.hook_point} of width {base.d_in}"
            )
        if point.batch_size != base.config.training.batch_size:
            raise UserError(
                f"training.batch_size: {base.config.training.batch_size} is not the sweep's, {point.batch_size}, and the best "
                "learning rate goes with it"
            )


def _require_falling(fit: Fit) -> None:
    """Else there is no best size: all that is spent would go into what still helps."""
    _, alpha, _, beta, delta = fit.exchange(fit.law.parameters)
    for what, slope, known in (("features", alpha, True), ("tokens", min(beta, beta + delta), fit.varies_tokens)):
        if known and not slope > 0:
            raise UserError(
                f"--sweep: in its law the loss does not fall with more {what}, so that there is no best number of them"
            )


def _beyond(fit: Fit, features: int, tokens: int, flops: float) -> dict[str, float]:
    found: dict[str, float] = {}
    swept = {
        "features": (features, [point.features for point in fit.everything]),
        "tokens": (tokens, [point.tokens for point in fit.everything]),
        "flops": (flops, [point.flops_dense for point in fit.everything]),
    }
    for name, (value, taken) in swept.items():
        low, high = min(taken), max(taken)
        if value > high:
            found[name] = round(value / high, 2)
        elif value < low:
            found[name] = round(value / low, 2)
    return found


def _require_carried(fit: Fit, loss: Estimate) -> None:
    best = [point.loss or 0.0 for point in frontier_points(fit.points)]
    gained, width = max(best) - min(best), loss.high - loss.low
    if not math.isfinite(width) or width > gained:
        raise UserError(
            f"--sweep: the fit does not carry this: the predicted loss {loss.value:.4g} lies between {loss.low:.4g} and "
            f"{loss.high:.4g}, an interval wider than the sweep's frontier, {min(best):.4g} to {max(best):.4g}; "
            "sweep more sizes and lengths, or a larger budget"
        )


def _rounded(value: float) -> int:
    """To digits that a person would write; a multiple of 8, which matrix units like, where it is large enough."""
    step = 8 if value >= 256 else 1
    return max(1, round(value / step) * step)


def _rounded_rate(rate: float) -> float:
    return float(f"{rate:.{_DIGITS}g}")
