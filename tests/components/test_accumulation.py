"""A batch in parts, whose gradients are averaged: the same training in less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import SAES, elsewhere, extracted, planned, until, weights

from components.planning.memory import rank_memory
from components.planning.shape import shape_of
from components.run.checks import check
from components.run.config import parse_config
from components.run.identity import TRAINING
from components.sae.architectures import architectures
from components.sae.coder import Column, Progress
from components.settings import UserError
from components.training.job import Training
from components.training.loop import Stopped, train, train_together
from components.training.settings import RankSettings, TrainingSettings
from components.training.step import CoderInTraining, backward, new_coder, take_step

CPU = torch.device("cpu")
EVERYWHERE = (Column("a", 12),)


def data(rows: int, width: int = 12) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def new(architecture: str, parts: int = 1, **settings: Any) -> tuple[CoderInTraining, TrainingSettings]:
    training = TrainingSettings(
        tokens=20 * 96, batch_size=96, learning_rate=1e-2, dead_after_tokens=10**6, gradient_accumulation_steps=parts
    )
    coder = architectures()[architecture].Settings(d_sae=48, **settings)
    job = Training(
        url="", digest="", identity={}, settings=training, coder=coder, dataset_url="", reads=("a",), writes=("a",), seed=0,
        metadata={},
    )  # fmt: skip
    return new_coder(job, EVERYWHERE, EVERYWHERE, CPU), training


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("relu", {"sparsity_coefficient": 0.5}), ("topk", {"k": 4}), ("jumprelu", {}), ("gated", {"sparsity_coefficient": 0.5})],
)
def test_parts_of_a_batch_teach_what_the_batch_teaches(architecture: str, settings: dict):
    found = []
    for parts in (1, 4):
        training, how = new(architecture, parts, **settings)
        points = [take_step(training, how, batch, batch, torch.zeros(12), measured=True) for batch in data(20 * 96).split(96)]
        found.append((points, training))
    (whole, large), (in_parts, small) = found
    for name, tensor in large.tensors().items():
        torch.testing.assert_close(small.tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    for ours, other in zip(in_parts, whole, strict=True):
        assert ours == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_batchtopk_chooses_within_each_part():
    training, how = new("batchtopk", 3, k=4, auxk_coefficient=0.0)
    coder, x = training.coder, data(96)
    alone = copy.deepcopy(coder)
    gradients, weakest = [], []
    for part in x.split(32):
        lengths = torch.relu(part @ alone.W_enc + alone.b_enc) * alone.W_dec.norm(dim=1)
        least = lengths.flatten().topk(4 * 32).values[-1]
        values = torch.relu(part @ alone.W_enc + alone.b_enc) * (lengths >= least)
        loss = (part - values @ alone.W_dec - alone.b_dec).square().sum(dim=1).mean()
        gradients.append(torch.autograd.grad(loss, [alone.W_enc, alone.W_dec, alone.b_enc, alone.b_dec]))
        weakest.append(least.item())
    backward(coder, how, x, x, Progress(0, 20))
    for parameter, *parts in zip((coder.W_enc, coder.W_dec, coder.b_enc, coder.b_dec), *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, sum(parts) / 3, rtol=1e-4, atol=1e-6)
    coder.after_step()
    assert coder.weakest.item() == pytest.approx(sum(weakest) / 3, rel=1e-5)


def peak(parts: int) -> int:
    """Bytes that a step has at most at once beyond what is there before it, as torch's allocator says."""
    training, how = new("relu", parts)
    x = data(96 * 64)
    how = how.model_copy(update={"batch_size": len(x)})
    backward(training.coder, how, x, x, Progress(0, 20))  # gradients are there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        backward(training.coder, how, x, x, Progress(1, 20))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_in_parts_a_step_takes_less_memory():
    assert peak(8) < 0.2 * peak(1)


def test_the_plan_knows_that_a_step_takes_less_memory(tiny_tree: dict):
    whole, parts = (
        rank_memory(shape_of(planned({**tiny_tree}, {**SAES["relu"], "d_sae": 4_096}, parts=parts)), on_gpu=True)
        for parts in (1, 8)
    )
    assert parts.activations < 0.2 * whole.activations
    assert (parts.parameters, parts.optimizer, parts.checkpoint) == (whole.parameters, whole.optimizer, whole.checkpoint)


def test_stopped_and_continued_and_beside_others_it_ends_with_the_same_bits(tiny_tree: dict):
    jobs = extracted({name: planned(tiny_tree, SAES[name], parts=4) for name in ("batchtopk", "relu")})
    jobs |= {"whole": planned(tiny_tree, SAES["relu"]).training()}
    assert len({job.digest for job in jobs.values()}) == 3
    for job in jobs.values():
        again = elsewhere(job, "again")
        with pytest.raises(Stopped):
            train(again, CPU, should_stop=until(19))
        train(again, CPU)
    train_together(list(jobs.values()), CPU)
    for name, job in jobs.items():
        for key, tensor in weights(job).items():
            assert torch.equal(tensor, weights(job, "again")[key]), (name, key)


def test_it_is_part_of_what_a_coder_is_only_where_it_is_used():
    assert "gradient_accumulation_steps" not in TRAINING.of(TrainingSettings())
    assert TRAINING.of(TrainingSettings(gradient_accumulation_steps=2))["gradient_accumulation_steps"] == 2


def test_what_cannot_be_is_refused(tiny_tree: dict):
    with pytest.raises(UserError, match=r"gradient_accumulation_steps: a batch of 128 tokens .* has no 3 equal parts"):
        planned(tiny_tree, SAES["relu"], parts=3)
    ranks = {"training": RankSettings(data_parallel=4).model_dump()}
    with pytest.raises(UserError, match=r"data_parallel: a batch of 128 tokens .* for 4 processes, each in 64 parts"):
        check(planned(tiny_tree, SAES["relu"], execution=ranks, parts=64))
    assert parse_config(tiny_tree).training.gradient_accumulation_steps == 1
