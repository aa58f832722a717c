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
