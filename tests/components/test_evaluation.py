"""Metrics against an independent float64 computation on a real forward pass, written in another way."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from components import steps
from components.activations.exclusion import Exclusion
from components.corpus.tokens import PADDING, Sequences, read_sequences
from components.evaluation.evaluate import Evaluation, HeldOut, TokenClasses, evaluate, reference_statistics
from components.evaluation.settings import EvaluationSettings
from components.language_model.loading import load_model, load_tokenizer
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.features import DenseFeatures

CPU = torch.device("cpu")


class Fake:
    """An SAE of tensors alone."""

    def reconstruct(self, x):
        features = self.encode(x)
        return DenseFeatures(features), self.decode(features)


class Identity(Fake):
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


class PaddedOnTheLeft(HeldOut):
    """The same text with every sequence's padding in front of it."""

    def batches(self, tokens, size):
        for block in super().batches(tokens, size):
            columns = {"tokens": block.tokens, "documents": block.documents, "positions": block.positions}
            trailing = [int((row[::-1] != PADDING).argmax()) for row in block.documents]
            moved = {
                name: np.stack([np.roll(row, count) for row, count in zip(values, trailing, strict=True)])
                for name, values in columns.items()
            }
            yield Sequences(**moved)


class Case:
    """Held-out text, a model and what is known of its activations, all in float64."""

    def __init__(self, tree: dict, hook_point: str = "resid_post.1") -> None:
        tree["activations"]["hook_points"] = [hook_point]
        self.plan = resolve(parse_config(tree))
        manifest = steps.prepare_tokens(self.plan)
        self.text = HeldOut(url=self.plan.token_url, manifest=manifest)
        self.model = load_model(self.plan.source, CPU).double()
        self.reference = reference_statistics(self.model, self.plan.point, self.text, 2_000, 16, CPU)

    def evaluate(self, sae, d_sae=64, tokens=400, text=None, classes=None, **settings) -> Evaluation:
        chosen = EvaluationSettings(**{"tokens": tokens, "baselines": (), **settings})
        text = text or self.text
        return evaluate(chosen, sae, d_sae, self.model, self.plan.point, text, self.reference, CPU, classes)


@pytest.fixture(params=["crossing", "within_document"])
def case(request: pytest.FixtureRequest, tiny_tree: dict) -> Case:
    """`crossing` has BOS first and separators in mid-sequence, `within_document` padding."""
    tiny_tree["corpus"]["packing"] = request.param
    return Case(tiny_tree)


@pytest.fixture
def one_case(tiny_tree: dict) -> Case:
    return Case(tiny_tree)


def measure(case: Case, sae, **settings) -> dict:
    return case.evaluate(sae, **settings).metrics


def random_sae() -> ReLUSAE:
    sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=64, decoder_init_norm=0.5), 32)
    sae.initialise(seed=3)
    torch.nn.init.normal_(sae.b_dec, generator=torch.Generator().manual_seed(4))
    return sae.double().requires_grad_(False)


def trained_sae(plan: Specification) -> ReLUSAE:
    from pathlib import Path

    from components.interop.saelens import load_saelens

    steps.extract(plan)
    steps.train(plan)
    return load_saelens(Path(plan.sae_url), CPU).double()


def independent(case: Case, sae, tokens: int) -> dict:
    """Everything in float64, one sequence at a time, with the blocks of the Llama called by hand after the hook."""
    plan, model = case.plan, case.model
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
        found, x_hat = sae.reconstruct(x[places])
        f = found.dense()
        rows.append(x[places])
        rows_hat.append(x_hat)
        features.append(f)
        stand_ins = {
            "clean": x[places],
            "sae": x_hat,
            "zero": torch.zeros_like(x_hat),
            "mean": case.reference.mean.expand_as(x_hat),
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


@pytest.mark.parametrize("tokens", [400, 137])
@pytest.mark.parametrize("which", ["scaled", "random"])
def test_metrics_agree_with_an_independent_float64_computation(case: Case, tokens: int, which: str):
    sae = Scaled(0.8) if which == "scaled" else random_sae()
    check_against_independent(case, sae, tokens)


def test_metrics_of_a_trained_sae_agree_with_an_independent_float64_computation(one_case: Case):
    check_against_independent(one_case, trained_sae(one_case.plan), 400)


def check_against_independent(case: Case, sae, tokens: int) -> None:
    measured = measure(case, sae, tokens=tokens)
    expected = independent(case, sae, tokens)
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name
    assert measured["ce_loss_zero"] != pytest.approx(measured["ce_loss_clean"], abs=1e-3)


def test_an_identity_recovers_everything(case: Case):
    metrics = measure(case, Identity())
    assert metrics["loss_recovered"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["explained_variance"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["kl_divergence"] == pytest.approx(0.0, abs=1e-12)
    assert (metrics["norm_ratio"], metrics["cosine_similarity"]) == pytest.approx((1.0, 1.0))


def test_a_zero_sae_recovers_nothing(case: Case):
    metrics = measure(case, Scaled(0.0))
    assert metrics["loss_recovered"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["norm_ratio"] == 0.0


def test_the_mean_predictor_explains_no_variance(case: Case):
    seen = []

    class Recorder(Identity):
        def encode(self, x):
            seen.append(x)
            return super().encode(x)

    assert measure(case, Recorder())["l0"] <= case.plan.d_in
    metrics = measure(case, Constant(torch.cat(seen).mean(dim=0)))
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["normalized_mse"] == pytest.approx(1.0, abs=1e-9)
    assert measure(case, Constant(case.reference.mean))["loss_recovered_mean"] == pytest.approx(0.0, abs=1e-9)


def test_a_half_scaled_sae_has_its_closed_form(case: Case):
    metrics = measure(case, Scaled(0.5))
    assert metrics["norm_ratio"] == pytest.approx(0.5, rel=1e-9)
    assert metrics["cosine_similarity"] == pytest.approx(1.0, rel=1e-9)
    assert metrics["mse"] == pytest.approx(0.25 * measure(case, Scaled(0.0))["mse"], rel=1e-9)


def test_no_number_depends_on_the_batch(case: Case):
    classes = TokenClasses(load_tokenizer(case.plan.source))
    whole = case.evaluate(random_sae(), classes=classes)
    for size in (1, 12, 64):
        parts = case.evaluate(random_sae(), classes=classes, batch_sequences=size)
        for name, value in whole.metrics.items():
            assert parts.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        for kind, rows in whole.breakdown.items():
            for row, other in zip(rows, parts.breakdown[kind], strict=True):
                assert other.pop("token_class", None) == row.get("token_class")
                assert other == pytest.approx({name: row[name] for name in other}, rel=1e-9)


def test_padding_on_the_left_changes_nothing(tiny_tree: dict):
    tiny_tree["corpus"]["packing"] = "within_document"
    case = Case(tiny_tree)
    left = PaddedOnTheLeft(url=case.text.url, manifest=case.text.manifest)
    assert any((block.documents[:, 0] == PADDING).any() for block in left.batches(400, 8))
    expected, measured = case.evaluate(random_sae()), case.evaluate(random_sae(), text=left)
    for name, value in expected.metrics.items():
        assert measured.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert measured.breakdown["position"] == expected.breakdown["position"]


@pytest.mark.parametrize("hook_point", ["resid_pre.0", "resid_pre.2", "resid_post.2", "attn_out.1", "mlp_out.0", "mlp_in.2"])
def test_other_hook_points_take_their_closed_forms_too(tiny_tree: dict, hook_point: str):
    case = Case(tiny_tree, hook_point)
    metrics = measure(case, Identity(), tokens=300)
    assert metrics["kl_divergence"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["ce_loss_sae"] == pytest.approx(metrics["ce_loss_clean"], rel=1e-12)
    assert measure(case, Scaled(0.0), tokens=300)["ce_loss_sae"] == pytest.approx(metrics["ce_loss_zero"], rel=1e-12)


def test_outliers_are_left_out_of_every_quantity_where_asked(one_case: Case):
    everything = measure(one_case, Scaled(0.8))
    norms = one_case.reference.sample.norm(dim=1)
    limits = {str(one_case.plan.point): 1.05 * norms.median().item()}
    one_case.reference = dataclasses.replace(one_case.reference, exclusion=Exclusion(norm_limits=limits))
    some = measure(one_case, Scaled(0.8))
    assert 0 < some["evaluation_tokens"] < everything["evaluation_tokens"]
    assert some["mse"] < everything["mse"]


def test_groups_add_up_to_the_whole(one_case: Case):
    classes = TokenClasses(load_tokenizer(one_case.plan.source))
    found = one_case.evaluate(random_sae(), classes=classes)
    metrics = found.metrics
    for rows in found.breakdown.values():
        assert sum(row["tokens"] for row in rows) == metrics["evaluation_tokens"]
        l0 = sum(row["tokens"] * row["l0"] for row in rows) / metrics["evaluation_tokens"]
        assert l0 == pytest.approx(metrics["l0"], rel=1e-12)
    assert [(row["first"], row["last"]) for row in found.breakdown["position"]] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    names = {row["token_class"] for row in found.breakdown["token_class"]}
    assert {"word start", "number", "punctuation"} <= names


def test_reference_statistics_are_those_of_the_training_activations(one_case: Case):
    # every training token, so that the sample is the whole
    reference = reference_statistics(one_case.model, one_case.plan.point, one_case.text, 10**9, 7, CPU)
    block = read_sequences(one_case.text.url, one_case.text.manifest, "train", 0, 10**6)
    states = one_case.model.model(torch.tensor(block.tokens).long(), output_hidden_states=True).hidden_states[2]
    rows = states[torch.tensor(block.documents >= 0)].numpy()
    np.testing.assert_allclose(reference.mean, rows.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(reference.covariance, np.cov(rows.T, bias=True), rtol=1e-6, atol=1e-9)
    assert reference.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean())
