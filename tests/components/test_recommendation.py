"""What a sweep recommends: the best of the budget by the law behind it, marked or refused where the fit does not carry it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from components.run.config import parse_config
from components.run.estimate import dense_flops, sparse_flops
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.sweeps.grid import children
from components.sweeps.recommendation import flops_of, predicted, recommend, with_values
from components.sweeps.record import SweepPoint, SweepRecord
from components.sweeps.scaling import Fit, Trial, fit_sweep

GRID = {
    "sae.d_sae": [64, 128, 256, 512],
    "training.tokens": [25_600, 51_200, 102_400, 204_800],
    "training.learning_rate": [1e-3, 2e-3, 4e-3],
}
PER_FEATURE = 10 * 32


def known(n, d):
    return 0.03 + 1.0 * n**-0.5 + 40.0 * d**-0.6


@pytest.fixture
def base(tiny_tree: dict) -> Specification:
    tiny_tree["sae"] = {"architecture": "batchtopk", "expansion_factor": 2, "k": 4}
    return resolve(parse_config(tiny_tree))


def sweep_of(base: Specification, loss: Callable = known, noise: float = 0.003, grid: dict | None = None) -> SweepRecord:
    """Losses by a law, at the settings of real children of `base`; the best rate is `0.02 n^-0.4`."""
    generator, points = np.random.default_rng(0), []
    grid = grid or GRID
    for child in children(base, grid):
        training, n = child.run.config.training, child.run.d_sae
        tokens = training.steps * training.batch_size
        away = np.log(training.learning_rate / (0.02 * n**-0.4))
        found = float(loss(n, tokens) * np.exp(0.1 * away**2 + noise * generator.standard_normal()))
        points.append(
            SweepPoint(
                values=child.values, status="finished", sae_digest=child.run.sae_digest, sae_url="", architecture="batchtopk",
                hook_point=base.hook_point, d_in=base.d_in, features=n, k=4, steps=training.steps, batch_size=256,
                tokens=tokens, learning_rate=training.learning_rate, flops_dense=dense_flops(child.run), loss=found,
                explained_variance=1 - found,
            )
        )  # fmt: skip
    return SweepRecord(
        digest="0", name="known", grid=grid, dataset_digest="0", evaluation_tokens=1, mlflow_run="0", seconds=0.0,
        points=tuple(points),
    )  # fmt: skip


@pytest.fixture
def fit(base: Specification) -> Fit:
    return fit_sweep(sweep_of(base), base.config, draws=200)


def test_a_budget_becomes_the_training_that_a_search_over_the_true_law_finds(base: Specification, fit: Fit):
    budget = 3 * 512 * 204_800 * PER_FEATURE
    found = recommend(base, fit, flops=budget)

    def spent_on(log_n: float) -> float:
        return known(np.exp(log_n), budget / PER_FEATURE / np.exp(log_n))

    best = minimize_scalar(spent_on, bounds=(2, 12))
    assert found.loss.value == pytest.approx(best.fun, rel=0.02)
    assert known(found.features, found.tokens) == pytest.approx(best.fun, rel=0.005)  # it is as good as the best
    assert found.loss.low < known(found.features, found.tokens) < found.loss.high
    assert found.learning_rate == pytest.approx(max(1e-3, 0.02 * found.features**-0.4), rel=0.1)
    run = with_values(base, found.set)
    assert found.flops_dense == dense_flops(run) == pytest.approx(budget, rel=0.02)
    assert found.flops_sparse == sparse_flops(run, 4)
    assert (run.d_sae, run.config.sae.k, run.config.training.steps) == (found.features, 4, found.steps)
    assert found.extrapolates["flops"] == pytest.approx(3, rel=0.02)
    assert run.dataset_digest == base.dataset_digest


def test_within_the_sweep_nothing_is_called_an_extrapolation(base: Specification, fit: Fit):
    inside = recommend(base, fit, features=200)
    assert inside.features == 200
    assert inside.extrapolates == {}
    n, _ = fit.optimum(inside.flops_dense)
    assert float(n) == pytest.approx(200, rel=0.02)  # as long as makes 200 the best number


def test_beyond_ten_times_the_largest_budget_it_is_refused(base: Specification, fit: Fit):
    largest = 512 * 204_800 * PER_FEATURE
    recommend(base, fit, flops=9 * largest)
    with pytest.raises(UserError, match=r"--flops: .* 12 times the sweep's largest budget.*at most 10 times"):
        recommend(base, fit, flops=12 * largest)
    with pytest.raises(UserError, match=r"--features: .* times the sweep's largest budget"):
        recommend(base, fit, features=100_000)


def test_what_the_trial_missed_by_moves_and_widens_what_is_said_beyond_the_sweep_and_nothing_within(fit: Fit):
    seen = Trial(fitted=13, foretold=3, mean=-0.1, spread=0.1, corrects=True)
    missed, few = replace(fit, trial=seen), replace(fit, trial=seen.model_copy(update={"corrects": False}))
    alone = replace(fit, trial=None)
    assert predicted(missed, 200, 100_000) == predicted(few, 200, 100_000) == predicted(alone, 200, 100_000)
    widths = {}
    for times in (3, 9):
        n, tokens = 1024, times * 102_400
        beyond, law = predicted(missed, n, tokens), predicted(alone, n, tokens)
        assert beyond.value == pytest.approx(law.value * np.exp(-0.1))  # no further than the trial went
        assert predicted(few, n, tokens).value == law.value
        assert beyond.low < beyond.value < beyond.high
        widths[times] = np.log(beyond.high / beyond.low) / 2
    # of a normal with that deviation the 90% interval is 1.645 to each side, and a little more with the bootstrap's own
    assert 0.164 < widths[3] < 0.24
    assert widths[9] == pytest.approx(2 * widths[3], rel=0.15)  # twice as far, in logarithms


@pytest.mark.parametrize(
    ("loss", "features", "tokens"),
    [
        (lambda n, d: 0.03 + 6.0 * n**-0.5 + 40.0 * d**-0.6, 3 * 512, 204_800),
        (lambda n, d: 0.03 + 0.2 * n**-0.5 + 400.0 * d**-0.6, 512, 3 * 204_800),
    ],
    ids=["features", "tokens"],
)
def test_nothing_is_further_beyond_the_sweep_than_the_budget(base: Specification, loss: Callable, features: int, tokens: int):
    fit = fit_sweep(sweep_of(base, loss, noise=0.0), base.config, draws=50)
    found = recommend(base, fit, flops=3 * 512 * 204_800 * PER_FEATURE)
    assert (found.features, found.tokens) == pytest.approx((features, tokens), rel=0.01)
    assert found.law_alone is not None
    assert (found.law_alone > features) == (features > 512)
    within = recommend(base, fit, flops=512 * 204_800 * PER_FEATURE / 3)
    assert within.features <= 512
    assert within.tokens <= 204_800


def test_an_interval_wider_than_the_effect_is_refused(base: Specification, fit: Fit):
    scattered = replace(fit, law=replace(fit.law, residuals=200 * fit.law.residuals))
    with pytest.raises(UserError, match="the fit does not carry this: the predicted loss"):
        recommend(base, scattered, flops=2 * 512 * 204_800 * PER_FEATURE)


@pytest.mark.parametrize("budget", [{"flops": 1e10}, {"features": 100}])
def test_where_more_features_do_not_help_there_is_no_best_number(base: Specification, budget: dict):
    worse = fit_sweep(sweep_of(base, loss=lambda n, d: 1e-3 * n**0.5 + 40.0 * d**-0.6), base.config, draws=20)
    with pytest.raises(UserError, match="does not fall with more features"):
        recommend(base, worse, **budget)


def test_a_sweep_of_one_length_says_nothing_of_budgets(base: Specification):
    grid = {"sae.d_sae": [64, 96, 128, 192, 256, 512], "training.tokens": [51_200]}
    one = fit_sweep(sweep_of(base, loss=lambda n, d: known(n, d), noise=0.0, grid=grid), base.config, draws=50)
    with pytest.raises(UserError, match="one length of training"):
        recommend(base, one, flops=1e10)
    found = recommend(base, one, features=160)
    assert found.tokens == 51_200
    assert found.loss.value == pytest.approx(
        known(160, 51_200) * np.exp(0.1 * np.log(1e-3 / (0.02 * 160**-0.4)) ** 2), rel=0.02
    )


def test_a_sweep_of_something_else_is_refused(base: Specification, fit: Fit, tiny_tree: dict):
    tiny_tree["training"]["batch_size"] = 512
    with pytest.raises(UserError, match=r"training\.batch_size: 512 is not the sweep's, 256"):
        recommend(resolve(parse_config(tiny_tree)), fit, flops=1e10)
    tiny_tree["training"] |= {"batch_size": 256}
    tiny_tree["sae"] = {"architecture": "relu"}
    with pytest.raises(UserError, match=r"batchtopk at resid_post\.1 .* CONFIG of relu"):
        recommend(resolve(parse_config(tiny_tree)), fit, flops=1e10)


def test_hours_of_a_gpu_become_flops_with_what_is_assumed():
    flops, said = flops_of("h100", 100, 0.3, "bfloat16")
    assert flops == pytest.approx(100 * 3600 * 989e12 * 0.3)
    assert "30% of 989 TFLOP/s" in said
    assert "not measured" in said
    with pytest.raises(UserError, match="--gpu: 'tpu' is not known; accepted are a100, h100"):
        flops_of("tpu", 1, 0.3, "none")
