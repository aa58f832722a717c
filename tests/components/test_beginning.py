"""New weights begin where the data is: the decoder bias at its mean or median, every feature on the wanted share of tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from components import steps, storage
from components.activations.dataset.reader import ActivationReader
from components.interop.saelens import load_saelens
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.sae.architectures import architectures
from components.training.beginning import SAMPLE_TOKENS, geometric_median
from components.training.loop import train_together

CPU = torch.device("cpu")
STILL = {"learning_rate": 1e-30, "tokens": 256}
"""A training whose only step changes nothing."""


@pytest.fixture
def extracted(tiny_tree: dict) -> dict:
    steps.extract(resolve(parse_config(tiny_tree)))
    return tiny_tree


def plan_of(tree: dict, training: dict | None = None, **sae: object) -> Specification:
    return resolve(parse_config({**tree, "sae": {**tree["sae"], **sae}, "training": {**tree["training"], **(training or {})}}))


def rows_of(plan: Specification, count: int) -> torch.Tensor:
    """The first that are trained on, as the model made them, float64."""
    manifest = plan.dataset_manifest()
    reader = ActivationReader(
        url=plan.dataset_url, manifest=manifest, columns=("resid_post.1",), batch_size=count, seed=plan.config.seed
    )
    batches = reader.batches()
    rows = next(batches)["resid_post.1"].double().clone()
    batches.close()
    return rows


def spread(rows: np.ndarray, point: np.ndarray) -> float:
    return float(np.linalg.norm(rows - point, axis=1).sum())


def test_the_geometric_median_is_the_point_of_the_smallest_sum_of_distances():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((400, 5)) * [1, 5, 1, 3, 1]
    rows[:30] += 200.0  # as tokens of enormous norm are, which draw the mean away
    found = geometric_median(torch.from_numpy(rows)).numpy()
    best = minimize(lambda point: spread(rows, point), np.median(rows, axis=0), tol=1e-12)
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    assert spread(rows, found) <= best.fun + 1e-6
    assert np.abs(rows.mean(axis=0)).max() > 10 > np.abs(found).max()
    line = torch.tensor([[0.0], [1.0], [2.0], [50.0], [90.0]])
    torch.testing.assert_close(geometric_median(line), torch.tensor([2.0], dtype=torch.float64), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", architectures())
def test_a_centred_coder_does_with_tokens_what_another_does_with_their_distances(name: str):
    kind = architectures()[name]
    x, point = torch.randn(200, 12) + 3.0, torch.randn(12) + 3.0
    plain, centred = (kind.autoencoder(kind.Settings(architecture=name, d_sae=40), 12) for _ in range(2))
    for coder in (plain, centred):
        coder.initialise(4)
    centred.centre(point, point)
    torch.testing.assert_close(centred(x), plain(x - point) + point, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu"])
@pytest.mark.parametrize("share", [0.005, 0.1, 0.9])
def test_every_feature_fires_on_the_wanted_share(name: str, share: float):
    kind = architectures()[name]
    x = torch.randn(2_000, 12) * torch.linspace(0.1, 3, 12) + 1.0
    coder = kind.autoencoder(kind.Settings(architecture=name, d_sae=40), 12)
    coder.initialise(4)
    coder.fire_on(x, share)
    assert coder.encode(x).fired().tolist() == [round(share * len(x))] * 40


@pytest.mark.parametrize("name", ["relu", "batchtopk", "gated"])
def test_a_training_begins_at_the_mean_of_its_data(extracted: dict, name: str):
    plan = plan_of(extracted, STILL, architecture=name, decoder_bias_init="mean")
    steps.train(plan)
    rows = rows_of(plan, plan.dataset_manifest().tokens)
    found = load_saelens(Path(plan.sae_url), CPU).b_dec.double()
    torch.testing.assert_close(found, rows.mean(dim=0), atol=1e-4 * rows.std().item(), rtol=0)
    assert found.norm() > 0.1 * rows.std()


def test_a_training_begins_at_the_median_of_its_first_tokens_and_on_the_wanted_share(extracted: dict):
    plan = plan_of(extracted, STILL, decoder_bias_init="geometric_median", first_density=0.03)
    steps.train(plan)
    rows = rows_of(plan, SAMPLE_TOKENS)
    coder = load_saelens(Path(plan.sae_url), CPU)
    pulls = torch.nn.functional.normalize(rows - coder.b_dec.double(), dim=1)  # from where their sum of distances is smallest
    assert pulls.mean(dim=0).norm() < 1e-5 < 0.01 < torch.nn.functional.normalize(rows, dim=1).mean(dim=0).norm()
    shares = coder.encode(rows.float()).fired() / len(rows)
    assert 0.028 < shares.min() <= shares.max() < 0.032  # rows of the tiny dataset come several times


@pytest.mark.parametrize("how", ["mean", "geometric_median"])
def test_interrupted_or_beside_another_it_ends_with_the_same_bytes(extracted: dict, how: str):
    plan = plan_of(extracted, decoder_bias_init=how, first_density=0.05)
    kept = steps.train(plan).weights_sha256
    storage.delete(plan.sae_url)
    other = dataclasses.replace(plan_of(extracted, sparsity_coefficient=1.0).training(), cache=None)
    together = train_together([other, plan.training()], CPU)
    assert together[1].weights_sha256 == kept != together[0].weights_sha256
    storage.delete(plan.sae_url)

    def stop(points: list[dict]) -> None:
        if points[-1]["tokens"] >= 9_000:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        steps.train(plan, stop)
    assert steps.train(plan).weights_sha256 == kept


def test_only_where_they_are_wanted_are_they_part_of_what_a_coder_is_called(extracted: dict):
    plain = plan_of(extracted).sae_digest
    assert plan_of(extracted, decoder_bias_init="zeros", first_density=None).sae_digest == plain
    options = ({"decoder_bias_init": "mean"}, {"decoder_bias_init": "geometric_median"}, {"first_density": 0.1})
    assert len({plain, *(plan_of(extracted, **one).sae_digest for one in options)}) == 4
