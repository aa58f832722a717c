"""Metrics against an independent float64 computation on a real forward pass, written in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from components import steps
from components.config import parse_config
from components.corpus.tokens import PADDING, read_sequences
from components.evaluation.evaluate import HeldOut, evaluate
from components.evaluation.metrics import LossSums, ReconstructionSums
from components.evaluation.settings import EvaluationSettings
from components.language_model.loading import load_model
from components.planning import Plan

CPU = torch.device("cpu")


class Identity:
    """Two features per dimension, so that negative values survive the ReLU: an SAE that loses nothing."""

    def encode(self, x):
        return torch.cat([x.relu(), (-x).relu()], dim=-1)

    def decode(self, features):
        up, down = features.chunk(2, dim=-1)
        return up - down


class Scaled(Identity):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def decode(self, features):
        return self.factor * super().decode(features)


class Constant(Identity):
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def decode(self, features):
        return self.value.to(features.dtype).expand(*features.shape[:-1], -1)


@pytest.fixture(params=["crossing", "within_document"])
def case(request: pytest.FixtureRequest, tiny_tree: dict):
    """A dataset, a model in float32, and the same model in float64."""
    tiny_tree["corpus"]["packing"] = request.param
    tiny_tree["activations"]["dtype"] = "float32"
    plan = Plan(parse_config(tiny_tree))
    manifest = steps.extract(plan)
    return plan, load_model(plan.source, CPU), manifest.column("resid_post.1")


def measure(case, sae, d_sae=64, tokens=1_000, **settings) -> dict:
    plan, model, column = case
    held_out = HeldOut(url=plan.token_url, manifest=plan.token_manifest())
    chosen = EvaluationSettings(tokens=tokens, **settings)
    metrics, features = evaluate(chosen, sae, d_sae, model, plan.point, held_out, column, CPU)
    assert features.num_rows == d_sae
    return metrics


def independent(case, sae, tokens: int) -> dict:
    """Everything in float64, one sequence at a time, with the blocks of the Llama called by hand after the hook."""
    plan, _, column = case
    model = load_model(plan.source, CPU).double()
    block = read_sequences(plan.token_url, plan.token_manifest(), "held_out", 0, 10**6)
    left = tokens
    rows, rows_hat, features = [], [], []
    loss = {name: [] for name in ("clean", "sae", "zero", "mean")}
    kl = []
    for ids, owner in zip(torch.tensor(block.tokens).long(), block.documents, strict=True):
        inner = model.model
        x = inner(ids[None], output_hidden_states=True).hidden_states[2]  # resid_post.1
        x = x[0]
        places = [place for place in range(len(ids)) if owner[place] >= 0][: max(left, 0)]
        left -= len(places)
        if not places:
            break
        f = sae.encode(x[places])
        x_hat = sae.decode(f)
        rows.append(x[places])
        rows_hat.append(x_hat)
        features.append(f)
        stand_ins = {
            "clean": x[places],
            "sae": x_hat,
            "zero": torch.zeros_like(x_hat),
            "mean": torch.tensor(column.mean, dtype=torch.float64).expand_as(x_hat),
        }
        probabilities = {}
        for name, stand_in in stand_ins.items():
            stream = x.clone()
            stream[places] = stand_in
            rotary = inner.rotary_emb(stream[None], torch.arange(len(ids))[None])
            after = inner.layers[2](stream[None], position_embeddings=rotary)
            after = after[0] if isinstance(after, tuple) else after
            logits = inner.norm(after.reshape(1, len(ids), -1))[0] @ model.lm_head.weight.T
            probabilities[name] = torch.exp(logits - logits.logsumexp(dim=1, keepdim=True))
        last = places[-1]
        for place in places:
            if place + 1 == len(ids) or owner[place + 1] == PADDING or (left <= 0 and place == last):
                continue
            for name in loss:
                loss[name].append(-math.log(probabilities[name][place, ids[place + 1]]))
            p, q = probabilities["clean"][place], probabilities["sae"][place]
            kl.append((p * (p / q).log()).sum().item())
    x, x_hat, f = (torch.cat(part).numpy() for part in (rows, rows_hat, features))
    ce = {name: float(np.mean(values)) for name, values in loss.items()}
    error, around = ((x - x_hat) ** 2).sum(), ((x - x.mean(axis=0)) ** 2).sum()
    lengths, lengths_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    cosines = (x * x_hat).sum(axis=1) / np.where(lengths * lengths_hat > 0, lengths * lengths_hat, 1)
    return {
        "mse": error / x.size,
        "normalized_mse": error / around,
        "explained_variance": 1 - error / around,
        "l0": (f > 0).sum() / len(x),
        "dead_fraction": np.mean((f > 0).sum(axis=0) == 0),
        "cosine_similarity": cosines.mean(),
        "norm_ratio": (lengths_hat / lengths).mean(),
        **{f"ce_loss_{name}": value for name, value in ce.items()},
        "loss_recovered": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "loss_recovered_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "kl_divergence": float(np.mean(kl)),
        "evaluation_tokens": len(x),
    }


@pytest.mark.parametrize("tokens", [1_000, 137])
def test_metrics_agree_with_an_independent_float64_computation(case, tokens: int):
    sae = Scaled(0.8)
    measured = measure(case, sae, tokens=tokens)
    expected = independent(case, sae, tokens)
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name
    assert measured["ce_loss_zero"] != pytest.approx(measured["ce_loss_clean"], abs=1e-3)


def test_an_identity_recovers_everything(case):
    metrics = measure(case, Identity())
    assert metrics["loss_recovered"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["explained_variance"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["kl_divergence"] == pytest.approx(0.0, abs=1e-6)
    assert (metrics["norm_ratio"], metrics["cosine_similarity"]) == pytest.approx((1.0, 1.0))


def test_a_zero_sae_recovers_nothing(case):
    metrics = measure(case, Scaled(0.0))
    assert metrics["loss_recovered"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["norm_ratio"] == 0.0


def test_the_mean_predictor_explains_no_variance(case):
    _, _, column = case
    identity = measure(case, Identity())
    seen = []

    class Recorder(Identity):
        def encode(self, x):
            seen.append(x)
            return super().encode(x)

    measure(case, Recorder())
    metrics = measure(case, Constant(torch.cat(seen).double().mean(dim=0)))
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["normalized_mse"] == pytest.approx(1.0, abs=1e-6)
    assert identity["l0"] <= column.d_in
    assert measure(case, Constant(torch.tensor(column.mean)))["loss_recovered_mean"] == pytest.approx(0.0, abs=1e-6)


def test_a_half_scaled_sae_has_its_closed_form(case):
    metrics = measure(case, Scaled(0.5))
    assert metrics["norm_ratio"] == pytest.approx(0.5, rel=1e-6)
    assert metrics["cosine_similarity"] == pytest.approx(1.0, rel=1e-6)
    assert metrics["mse"] == pytest.approx(0.25 * measure(case, Scaled(0.0))["mse"], rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_no_metric_depends_on_the_batch(case, size: int):
    whole, parts = measure(case, Scaled(0.8)), measure(case, Scaled(0.8), batch_sequences=size)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_outliers_are_left_out_of_every_quantity_where_asked(case):
    everything = measure(case, Scaled(0.8))
    some = measure(case, Scaled(0.8), exclude_norms_above=1.05)
    assert 0 < some["evaluation_tokens"] < everything["evaluation_tokens"]
    assert some["mse"] < everything["mse"]


def test_a_hook_point_that_costs_nothing_has_no_ratio():
    sums = LossSums()
    logits = torch.randn(5, 7)
    sums.add(logits, dict.fromkeys(LossSums.VARIANTS, logits), torch.arange(5), torch.ones(5, dtype=torch.bool))
    assert sums.metrics()["loss_recovered"] is None


def test_the_variance_survives_a_mean_far_from_the_shift():
    x = torch.randn(1000, 4, dtype=torch.float64) + 1e4
    sums = ReconstructionSums(4, 2, torch.full((4,), 1e4))
    for part in x.split(77):
        sums.add(part, part + 0.1, torch.ones(len(part), 2))
    expected = 1 - 0.01 * x.numel() / (x - x.mean(dim=0)).square().sum().item()
    assert sums.metrics()["explained_variance"] == pytest.approx(expected, rel=1e-6)
