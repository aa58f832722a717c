"""Features that died come back: in trainings that begin with half of them silenced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.sae.architectures import architectures
from components.sae.coder import Column
from components.training.job import Training
from components.training.settings import TrainingSettings
from components.training.step import new_coder, take_step

BATCH, STEPS, SILENT = 256, 1_200, 10_000


def dead_fraction(name: str, **options: Any) -> float:
    """At the end of a training on 64 features in 32 dimensions, by a coder half of whose biases start far below zero."""
    settings = TrainingSettings(tokens=STEPS * BATCH, batch_size=BATCH, learning_rate=5e-3, dead_after_tokens=SILENT)
    job = Training(
        url="", digest="", identity={}, settings=settings, coder=architectures()[name].Settings(d_sae=64, **options),
        dataset_url="", reads=("x",), writes=("x",), seed=0, metadata={},
    )  # fmt: skip
    column, generator = (Column("x", 32),), torch.Generator().manual_seed(1)
    training = new_coder(job, column, column, torch.device("cpu"))
    with torch.no_grad():
        training.coder.b_enc[:32] = -5.0
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    for _ in range(STEPS):
        firing = (torch.rand(BATCH, 64, generator=generator) < 0.06) * (1 + torch.rand(BATCH, 64, generator=generator))
        x = 2 * firing @ directions
        take_step(training, settings, x, x, torch.zeros(32), measured=False)
    return (training.silent_tokens >= SILENT).float().mean().item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relu", {"sparsity_coefficient": 0.5, "decoder_init_norm": 1.0}),
        ("topk", {"k": 5}),
        ("batchtopk", {"k": 5}),
        ("matryoshka", {"k": 5}),
    ],
)
def test_dead_features_come_back_with_auxk_and_not_without(name: str, options: dict[str, Any]):
    assert dead_fraction(name, **options, auxk_coefficient=0.0) >= 0.2  # some of the ReLU's find back alone
    assert dead_fraction(name, **options, auxk_coefficient=1 / 32) < 0.05


def test_dead_features_of_a_relu_come_back_by_resampling():
    options = {"sparsity_coefficient": 0.5, "decoder_init_norm": 1.0}
    assert dead_fraction("relu", **options, resample_at=(0.1, 0.3, 0.5, 0.7)) < 0.05


def in_training(**options: Any) -> tuple[Any, TrainingSettings, torch.Tensor]:
    settings = TrainingSettings(tokens=10 * BATCH, batch_size=BATCH, learning_rate=1e-2, dead_after_tokens=BATCH)
    coder = architectures()["relu"].Settings(d_sae=16, decoder_init_norm=1.0, **options)
    job = Training(
        url="", digest="", identity={}, settings=settings, coder=coder, dataset_url="", reads=("x",), writes=("x",), seed=3,
        metadata={},
    )  # fmt: skip
    column = (Column("x", 8),)
    training = new_coder(job, column, column, torch.device("cpu"))
    with torch.no_grad():
        training.coder.b_enc[:4] = -100.0
    return training, settings, torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(2))


def test_a_feature_that_begins_anew_points_along_a_token_and_has_no_past():
    training, settings, x = in_training(resample_at=(0.5,))
    for step in range(5):
        before = training.coder.b_enc.detach().clone()
        take_step(training, settings, x, x, torch.zeros(8), measured=False)
        assert bool((training.coder.b_enc[:4] < -50).all()) == (step < 4)
    coder, fresh = training.coder, slice(0, 4)
    assert not coder.b_enc[fresh].any()
    assert not torch.equal(coder.b_enc[4:], before[4:])  # the others have taken their step
    toward = torch.nn.functional.normalize(x - coder.b_dec, dim=1) @ torch.nn.functional.normalize(coder.W_dec[fresh], dim=1).T
    torch.testing.assert_close(toward.amax(dim=0), torch.ones(4))
    torch.testing.assert_close(coder.W_dec[fresh].norm(dim=1), coder.W_dec[4:].norm(dim=1).mean().expand(4))
    torch.testing.assert_close(coder.W_enc[:, fresh].norm(dim=0), 0.2 * coder.W_enc[:, 4:].norm(dim=0).mean().expand(4))
    for parameter, part in ((coder.W_dec, (fresh,)), (coder.W_enc, (slice(None), fresh)), (coder.b_enc, (fresh,))):
        assert not training.optimizer.state[parameter]["exp_avg"][part].any()
        assert training.optimizer.state[parameter]["exp_avg"].any()
    again, _, _ = in_training(resample_at=(0.5,))
    for _ in range(5):
        take_step(again, settings, x, x, torch.zeros(8), measured=False)
    assert torch.equal(again.coder.W_dec, coder.W_dec)
