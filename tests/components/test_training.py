"""Training ends with the same weights however often it is interrupted, and its curves say what happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components import steps, storage
from components.activations.dataset.reader import ActivationReader
from components.interop.saelens import load_saelens
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.coder import Progress
from components.settings import UserError
from components.training.checkpoint import checkpoint_folder
from components.training.job import read_training_record
from components.training.schedule import learning_rate
from components.training.settings import TrainingSettings

CPU = torch.device("cpu")


@pytest.fixture
def plan(tiny_tree: dict) -> Specification:
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    return plan


def fresh(tree: dict, sparsity_coefficient: float = 5.0, sparsity_warmup: float = 0.05, **training) -> Specification:
    sae = {**tree["sae"], "sparsity_coefficient": sparsity_coefficient, "sparsity_warmup": sparsity_warmup}
    return resolve(parse_config({**tree, "sae": sae, "training": {**tree["training"], **training}}))


class Interrupted(Exception):
    pass


def stopping_after(tokens: int):
    def on_points(points: list[dict]) -> None:
        if points[-1]["tokens"] >= tokens:
            raise Interrupted

    return on_points


@pytest.mark.parametrize("stops", [[5_000], [4_096, 9_000, 15_000], [20_000]])
def test_interrupted_training_ends_with_the_same_bytes(plan: Specification, tiny_tree: dict, stops: list[int]):
    record = steps.train(plan)
    weights = storage.read_bytes(f"{plan.sae_url}/sae_weights.safetensors")
    storage.delete(plan.sae_url)
    for tokens in stops:
        with pytest.raises(Interrupted):
            steps.train(plan, stopping_after(tokens))
        assert storage.list_names(checkpoint_folder(plan.sae_url))
    again = steps.train(plan)
    assert storage.read_bytes(f"{plan.sae_url}/sae_weights.safetensors") == weights
    assert again.curves == record.curves
    assert storage.list_names(checkpoint_folder(plan.sae_url)) == []


def test_a_resumed_training_starts_at_the_checkpoint_and_not_anew(plan: Specification):
    with pytest.raises(Interrupted):
        steps.train(plan, stopping_after(15_000))
    seen: list[float] = []
    steps.train(plan, lambda points: seen.extend(point["tokens"] for point in points))
    assert seen == sorted(set(seen))
    assert read_training_record(plan.sae_url).curves[-1]["tokens"] == seen[-1]


def test_how_often_it_is_logged_or_checkpointed_changes_no_weight(plan: Specification, tiny_tree: dict):
    first = steps.train(plan)
    storage.delete(plan.sae_url)
    other = fresh(tiny_tree, checkpoint_tokens=1_000, log_tokens=500)
    assert other.sae_digest == plan.sae_digest
    assert steps.train(other).weights_sha256 == first.weights_sha256


def test_what_is_trained_is_reused_and_what_decides_it_makes_another(plan: Specification, tiny_tree: dict):
    record = steps.train(plan)
    assert steps.train(plan) == record
    for change in ({"sparsity_coefficient": 1.0}, {"learning_rate": 1e-4}, {"tokens": 21_000}, {"batch_size": 128}):
        assert fresh(tiny_tree, **change).sae_digest != plan.sae_digest


def test_training_lowers_the_loss_on_the_data(plan: Specification, tiny_tree: dict):
    record = steps.train(fresh(tiny_tree, learning_rate=1e-2, sparsity_coefficient=0.5))
    first, last = record.curves[1], record.curves[-1]
    assert last["reconstruction_loss"] < first["reconstruction_loss"]
    assert last["explained_variance"] > 0.3


def test_the_first_step_is_adam_on_the_clipped_gradient(plan: Specification, tiny_tree: dict):
    """One step, done again by hand: Adam's first step is the learning rate times the gradient's sign, softened."""
    one = fresh(tiny_tree, tokens=256, batch_size=256, sparsity_warmup=0.0, learning_rate_decay=0.0, clip_gradient_norm=1e-3)
    manifest = plan.dataset_manifest()
    column = manifest.column("resid_post.1")
    sae = ReLUSAE.autoencoder(one.config.sae, 32)
    sae.initialise(0)
    source = ActivationReader(
        url=plan.dataset_url, manifest=manifest, columns=("resid_post.1",), batch_size=256, seed=plan.config.seed
    )
    batches = source.batches()
    x = next(batches)["resid_post.1"].float() * column.scale
    batches.close()
    sae.losses(x, x, Progress(0, 1)).total.backward()
    gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
    norm = torch.cat([gradient.ravel() for gradient in gradients.values()]).norm()
    assert norm > 1e-3
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            clipped = gradients[name] * (1e-3 / norm)
            parameter -= one.config.training.learning_rate * clipped / (clipped.abs() + 1e-8)
    steps.train(one)
    trained = load_saelens(Path(one.sae_url), CPU)
    expected = sae.folded([column.scale], [column.scale])
    torch.testing.assert_close(trained.W_dec, expected.W_dec, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.W_enc, expected.W_enc, rtol=1e-4, atol=1e-5)


def test_schedules_rise_stay_and_fall():
    settings = TrainingSettings(learning_rate=2.0, learning_rate_warmup=0.1, learning_rate_decay=0.2)
    rates = [learning_rate(settings, Progress(step, 100)) for step in (0, 5, 10, 79, 90, 100)]
    assert rates == pytest.approx([0, 1, 2, 2, 1, 0])
    sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=4, sparsity_coefficient=5.0, sparsity_warmup=0.5), 2)
    x = torch.ones(3, 2)
    found = [sae.losses(x, x, Progress(step, 100)).weights["sparsity"] for step in (0, 25, 50, 99)]
    assert found == pytest.approx([0, 2.5, 5, 5])


def test_dead_features_are_counted_in_tokens(tiny_tree: dict):
    tiny_tree["training"].update({"learning_rate": 1e-2, "dead_after_tokens": 6_000, "tokens": 30_000})
    tiny_tree["sae"]["sparsity_coefficient"] = 1000.0
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    curves = steps.train(plan).curves
    assert curves[1]["dead_fraction"] == 0  # fewer than 6,000 tokens yet
    assert curves[-1]["dead_fraction"] > 0.2


def test_bfloat16_autocast_trains_and_keeps_weights_in_float32(tiny_tree: dict, plan: Specification):
    other = fresh(tiny_tree, autocast="bfloat16")
    record = steps.train(other)
    exact = steps.train(plan)
    assert record.weights_sha256 != exact.weights_sha256
    assert record.curves[-1]["loss"] == pytest.approx(exact.curves[-1]["loss"], rel=0.05)
    assert load_saelens(Path(other.sae_url), CPU).W_enc.dtype == torch.float32


def test_training_without_its_dataset_says_what_to_run(tiny_tree: dict):
    with pytest.raises(UserError, match="sae extract"):
        steps.train(resolve(parse_config(tiny_tree)))


def test_divergence_is_reported_with_what_to_change(tiny_tree: dict, plan: Specification):
    with pytest.raises(FloatingPointError, match=r"training\.learning_rate"):
        steps.train(fresh(tiny_tree, learning_rate=1e15, tokens=200_000))
