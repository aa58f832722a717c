"""Laws that are known are found again, with intervals that hold them; what a sweep cannot say is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import least_squares, minimize_scalar

from components.run.config import RunConfig, parse_config
from components.settings import UserError
from components.sweeps import charts, page
from components.sweeps.findings import findings
from components.sweeps.laws import POWER, Law, fit, fit_many, interval
from components.sweeps.learning_rate import best_learning_rate
from components.sweeps.record import SweepPoint, SweepRecord
from components.sweeps.scaling import fit_sweep

GAO = Law({"floor": ("1", "k"), "features": ("1", "n", "k", "kn")})
PER_FEATURE = 10 * 128  # dense FLOPs per feature and token at width 128


def config(k: int = 16, **sae) -> RunConfig:
    return parse_config({"sae": {"architecture": "batchtopk", "k": k, **sae}})


def record(loss: Callable, features, tokens, rates=(1e-3,), ks=(16,), noise: float = 0.0, seed: int = 0) -> SweepRecord:
    """A sweep whose losses a function says. loss: of features, tokens, rate and k."""
    generator, points = np.random.default_rng(seed), []
    for n in features:
        for d in tokens:
            for rate in rates:
                for k in ks:
                    values = {"sae.d_sae": n, "training.tokens": d, "training.learning_rate": rate, "sae.k": k}
                    found = float(loss(n, d, rate, k) * np.exp(noise * generator.standard_normal()))
                    points.append(
                        SweepPoint(
                            values=values, status="finished", sae_digest=str(len(points)), sae_url="", architecture="batchtopk",
                            hook_point="resid_post.1", d_in=128, features=n, k=k, steps=d // 1000, batch_size=1000, tokens=d,
                            learning_rate=rate, flops_dense=PER_FEATURE * n * d, loss=found, explained_variance=1 - found,
                        )
                    )  # fmt: skip
    grid = {"sae.d_sae": list(features), "training.tokens": list(tokens)}
    grid |= {"training.learning_rate": list(rates), "sae.k": list(ks)}
    return SweepRecord(
        digest="0", name="known", grid=grid, dataset_digest="0", evaluation_tokens=1, mlflow_run="0", seconds=0.0,
        points=tuple(points),
    )  # fmt: skip


def covered(law: Law, logs: dict[str, np.ndarray], truth: dict[str, float], noise: float, sets: int, draws: int):
    """Per parameter: how many of so many noisy sets of losses have the truth in their 90% interval, and the mean estimate."""
    exact = law.log_loss(np.array([truth[name] for name in law.names]), logs)
    losses = np.exp(exact + noise * np.random.default_rng(7).standard_normal((sets, len(exact))))
    found, drawn = fit_many(law, logs, losses, draws)
    freedom = len(exact) - len(law.names)
    counts = {}
    for place, name in enumerate(law.names):
        ends = [interval(one, freedom) for one in drawn[:, :, place]]
        counts[name] = sum(low <= truth[name] <= high for low, high in ends)
    return counts, dict(zip(law.names, found.mean(axis=0), strict=True))


POWER_TRUTH = {"floor.1": np.log(0.09), "compute.1": np.log(0.2 * 1e10**0.12), "compute.C": -0.12}
POWER_LOGS = {"C": np.log(np.geomspace(1e10, 1e14, 24))}
GAO_TRUTH = {
    "floor.1": -1.6, "floor.k": -0.35, "features.1": -0.4, "features.n": -0.22, "features.k": -0.1, "features.kn": -0.02,
}  # fmt: skip
_N, _K = np.meshgrid([512.0, 1024, 2048, 4096, 8192, 16384], [8.0, 16, 32, 64, 128])
GAO_LOGS = {"n": np.log(_N.ravel()), "k": np.log(_K.ravel())}


@pytest.mark.parametrize(
    ("law", "logs", "truth"), [(POWER, POWER_LOGS, POWER_TRUTH), (GAO, GAO_LOGS, GAO_TRUTH)], ids=["power", "features and k"]
)
def test_intervals_hold_the_truth_as_often_as_they_say(law: Law, logs: dict, truth: dict):
    counts, means = covered(law, logs, truth, noise=0.001, sets=100, draws=60)
    assert all(count >= 80 for count in counts.values()), counts
    for name in truth.keys() - {"features.kn"}:
        assert means[name] == pytest.approx(truth[name], rel=0.05), name
    # the interplay is the smallest of the terms: what it does over the whole range of k is within 5% of what k does
    if "features.kn" in truth:
        assert abs(means["features.kn"] - truth["features.kn"]) < 0.05 * abs(truth["features.n"])


def test_one_bad_training_does_not_bend_the_law():
    losses = np.exp(POWER.log_loss(np.array(list(POWER_TRUTH.values())), POWER_LOGS))
    losses *= np.exp(0.001 * np.random.default_rng(0).standard_normal(24))
    losses[11] *= 1.5
    assert -fit(POWER, POWER_LOGS, losses, draws=0)["compute.C"] == pytest.approx(0.12, rel=0.05)


def test_the_fit_is_the_one_that_scipy_finds():
    losses = np.exp(POWER.log_loss(np.array(list(POWER_TRUTH.values())), POWER_LOGS))
    losses *= np.exp(0.02 * np.random.default_rng(3).standard_normal(24))
    ours = fit(POWER, POWER_LOGS, losses, draws=0)
    log_c = POWER_LOGS["C"]

    def residuals(p, scale=1.0):
        return (np.log(losses) - np.log(np.exp(p[0]) + np.exp(p[1] - p[2] * (log_c - log_c.mean())))) / scale

    theirs = least_squares(residuals, [np.log(0.09), -4.0, 0.12], xtol=1e-14, ftol=1e-14)
    for _ in range(4):
        scale = 1.4826 * np.median(np.abs(residuals(theirs.x))) * np.sqrt(24 / 21)
        theirs = least_squares(residuals, theirs.x, args=(scale,), loss="huber", f_scale=1.345, xtol=1e-14, ftol=1e-14)
    assert -ours["compute.C"] == pytest.approx(theirs.x[2], rel=1e-3)
    assert np.exp(ours["floor.1"]) == pytest.approx(np.exp(theirs.x[0]), rel=1e-3)


def chinchilla(n, d, rate=0.0, k=0):
    return 0.03 + 2.0 * n**-0.5 + 40.0 * d**-0.6


def slower_if_larger(n, d, rate=0.0, k=0):
    return 0.03 + 2.0 * n**-0.5 + 10.0 * d**-0.6 * n**0.2


@pytest.mark.parametrize(("truth", "exponent"), [(chinchilla, 0.6 / 1.1), (slower_if_larger, 0.6 / 1.3)])
def test_the_optimum_of_a_budget_is_the_one_that_a_search_finds(truth: Callable, exponent: float):
    found = fit_sweep(record(truth, [256, 512, 1024, 2048], [10**5, 2 * 10**5, 4 * 10**5, 8 * 10**5]), config(), draws=50)
    laws = found.summary()
    assert laws.frontier is not None
    assert laws.features is not None
    assert laws.steps is not None
    for budget in (1e11, 1e12, 1e13):
        each = budget / PER_FEATURE
        best = minimize_scalar(lambda log_n, each=each: truth(np.exp(log_n), each / np.exp(log_n)), bounds=(1, 20))
        n, d = (float(value) for value in found.optimum(budget))
        assert n == pytest.approx(np.exp(best.x), rel=0.02)
        assert n * d == pytest.approx(each)
        frontier = laws.frontier
        law = frontier.floor.value + frontier.coefficient * budget**-frontier.exponent.value
        assert law == pytest.approx(best.fun, rel=0.01)
        assert laws.features.coefficient * budget**laws.features.exponent.value == pytest.approx(n)
        assert laws.steps.coefficient * budget**laws.steps.exponent.value == pytest.approx(d / 1000)
    assert laws.features.exponent.value == pytest.approx(exponent, rel=0.05)
    assert found.tokens_for(n) == pytest.approx(d)


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_the_law_of_the_cheaper_settings_is_tried_on_the_dearer_ones(factor: float):
    sizes, lengths = [256, 512, 1024, 2048], [10**5, 2 * 10**5, 4 * 10**5, 8 * 10**5]
    dear = 2048 * 8 * 10**5 / 3

    def loss(n, d, rate, k):
        return chinchilla(n, d) * (factor if n * d > dear else 1.0)

    found = fit_sweep(record(loss, sizes, lengths), config(), draws=20)
    assert found.trial is not None
    assert (found.trial.fitted, found.trial.foretold, found.trial.corrects) == (13, 3, True)
    assert found.trial.mean == pytest.approx(np.log(factor), abs=0.002)
    assert found.trial.spread == pytest.approx(-np.log(factor), abs=0.002)
    (said,) = [(value, error) for name, value, error in page.laws_table(found.summary()) if "13 cheapest" in name]
    assert float(said[0]) == pytest.approx(factor, abs=0.002)
    close = fit_sweep(record(loss, sizes[:3], [100_000, 120_000, 144_000]), config(), draws=20)
    assert close.trial is None  # one size would be left to fit


def test_with_k_in_the_sweep_the_laws_are_at_the_configurations_own():
    def loss(n, d, rate, k):
        return np.exp(-1.6 - 0.35 * np.log(k)) + np.exp(-0.2 + (-0.5 + 0.02 * np.log(k)) * np.log(n)) + 40 * d**-0.6

    sweep = record(loss, [256, 512, 1024, 2048], [10**5, 2 * 10**5, 4 * 10**5], ks=[4, 16, 64])
    found = fit_sweep(sweep, config(k=8), draws=20)
    assert np.exp(found.log_loss(777, 150_000))[0] == pytest.approx(loss(777, 150_000, 0, 8), rel=0.02)
    with pytest.raises(UserError, match=r"sae\.k: 128 .* 4 to 64"):
        fit_sweep(sweep, config(k=128), draws=0)


def test_the_best_learning_rate_is_a_power_of_size_and_length():
    def loss(n, d, rate, k):
        return chinchilla(n, d) * np.exp(0.1 * (np.log(rate) - np.log(0.6 * n**-0.4 * d**-0.2)) ** 2)

    sweep = record(loss, [256, 512, 1024, 2048], [10**5, 2 * 10**5, 4 * 10**5], rates=[1e-3, 2e-3, 4e-3, 8e-3], noise=0.002)
    found = best_learning_rate(list(sweep.points), draws=200)
    assert found.exponent == pytest.approx(-0.4, rel=0.1)
    assert found.low is not None
    assert found.high is not None
    assert found.low < -0.4 < found.high
    assert found.tokens_exponent == pytest.approx(-0.2, abs=0.04)
    assert found.at(700, 250_000) == pytest.approx(0.6 * 700**-0.4 * 250_000**-0.2, rel=0.05)
    assert found.at(10**9, 10**5) == 1e-3  # none that was not tried
    fitted = fit_sweep(sweep, config(), draws=20)
    assert len(fitted.points) == 12
    # the law is of the best rate, and not of the best of those that were tried, which are up to 1.2% worse
    assert np.exp(fitted.log_loss(700, 250_000))[0] == pytest.approx(chinchilla(700, 250_000), rel=0.003)
    two = best_learning_rate([point for point in sweep.points if point.learning_rate in (1e-3, 4e-3)], draws=10)
    assert two.coefficient is None
    assert "three rates" in two.said
    assert two.at(300, 10**5) == two.tried[256]


@pytest.mark.parametrize(
    ("features", "tokens", "message"),
    [
        ([256, 512], [10**5, 2 * 10**5, 4 * 10**5], "at least 3 numbers of features; it has 2"),
        ([256, 512, 1024], [10**5, 2 * 10**5], "one length of training or at least 3; it has 2"),
        ([256, 512, 1024], [10**5], "3 of its settings have finished"),
    ],
)
def test_too_small_a_sweep_gives_no_law(features: list[int], tokens: list[int], message: str):
    with pytest.raises(UserError, match=message):
        fit_sweep(record(chinchilla, features, tokens), config())


def test_what_else_varies_is_held_at_the_configurations_value():
    sweep = record(chinchilla, [256, 512, 1024, 2048], [10**5, 2 * 10**5, 4 * 10**5])
    worse = [
        point.model_copy(update={"values": {**point.values, "sae.auxk_coefficient": value}, "loss": (point.loss or 0) + value})
        for point in sweep.points
        for value in (0.0, 0.5)
    ]
    both = sweep.model_copy(update={"points": tuple(worse), "grid": {**sweep.grid, "sae.auxk_coefficient": [0.0, 0.5]}})
    found = fit_sweep(both, config(auxk_coefficient=0.0), draws=0)
    assert [point.loss for point in found.points] == pytest.approx(
        [point.loss for point in fit_sweep(sweep, config(), draws=0).points]
    )
    with pytest.raises(UserError, match=r"varies sae\.auxk_coefficient \(0\.0, 0\.5\), and CONFIG's 0\.25"):
        fit_sweep(both, config(auxk_coefficient=0.25))


def test_the_pictures_show_the_points_and_the_law():
    sweep = record(chinchilla, [256, 512, 1024, 2048], [10**5, 2 * 10**5, 4 * 10**5], rates=[1e-3, 2e-3])
    points = [point.model_copy(update={"l0": 12.0 + place, "loss_recovered": 0.9}) for place, point in enumerate(sweep.points)]
    found = fit_sweep(sweep.model_copy(update={"points": tuple(points)}), config(), draws=0)
    axes, *_ = charts.isoflop(found).axes
    assert sorted(axes.collections[0].get_offsets().data[:, 0]) == sorted(point.features for point in found.points)
    optima = [line for line in axes.lines if line.get_marker() == "x"]
    assert len(optima) == 5
    for curve, optimum in zip([line for line in axes.lines if line.get_marker() != "x"], optima, strict=True):
        assert float(optimum.get_ydata()[0]) <= float(np.min(curve.get_ydata())) * (1 + 1e-6)
    (frontier,) = charts.frontier(found).axes
    assert len(frontier.collections[0].get_offsets()) == 24
    losses = frontier.lines[0].get_ydata()
    assert list(losses) == sorted(losses, reverse=True)
    failed = points[0].model_copy(update={"status": "failed", "reason": "<no> memory", "loss": None})
    shown = sweep.model_copy(update={"points": (*points, failed)})
    html = page.render(shown, findings(shown, config()), charts.pictures(points, found))
    assert html.count("<svg") == 3
    assert "&lt;no&gt; memory" in html
    assert not re.search(r"https?://|<script|src=", html), "it needs a network"
    recovered, variance = charts.pareto(points).axes
    assert len(recovered.collections[0].get_offsets()) == len(variance.collections[0].get_offsets()) == 24
    assert len(recovered.lines[0].get_xdata()) == 1  # all recover as much: the sparsest alone is unbeaten
