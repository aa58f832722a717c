"""Every architecture: its loss and gradient against an independent computation, what is folded, and what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from components.interop.saelens import load_saelens, saelens_files
from components.sae.architectures import architectures
from components.sae.architectures.batchtopk import BatchTopKSAE, BatchTopKSettings
from components.sae.architectures.gated import GatedSettings
from components.sae.architectures.jumprelu import JumpReLUSAE, JumpReLUSettings
from components.sae.architectures.matryoshka import MatryoshkaSettings
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.architectures.topk import TopKSAE, TopKSettings
from components.sae.auxiliary import auxk_loss
from components.sae.coder import Coder, Column, Progress

CPU = torch.device("cpu")
WHOLE = Progress(100, 100)
SETTINGS = {
    "relu": ReLUSettings(d_sae=20, sparsity_coefficient=3.0, decoder_init_norm=0.7),
    "topk": TopKSettings(d_sae=20, k=4, auxk_coefficient=0.0),
    "batchtopk": BatchTopKSettings(d_sae=20, k=4, auxk_coefficient=0.0),
    "matryoshka": MatryoshkaSettings(d_sae=20, k=4, auxk_coefficient=0.0),
    "jumprelu": JumpReLUSettings(d_sae=20, bandwidth=0.3, pre_activation_coefficient=0.01),
    "gated": GatedSettings(d_sae=20, sparsity_coefficient=2.0),
}


def made(name: str, seed: int = 3) -> Coder:
    """One in mid-training: every parameter and buffer is somewhere."""
    coder = architectures()[name].autoencoder(SETTINGS[name], 6)
    coder.initialise(seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for key, parameter in coder.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.abs() if key == "threshold" else noise
    coder.losses(inputs(), inputs(), WHOLE)
    coder.after_step()
    return coder


def inputs(count: int = 50, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def weights(coder: Coder) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in coder.state_dict().items()}


# The losses again, token by token, in numpy. None of it is shared with the code under test.


def squared(x: np.ndarray, f: np.ndarray, w: dict[str, np.ndarray]) -> float:
    return ((x - f @ w["W_dec"] - w["b_dec"]) ** 2).sum(axis=1).mean()


def relu_in_numpy(w: dict[str, np.ndarray], x: np.ndarray) -> float:
    f = np.maximum(x @ w["W_enc"] + w["b_enc"], 0)
    return squared(x, f, w) + 3.0 * (f * np.linalg.norm(w["W_dec"], axis=1)).sum(axis=1).mean()


def topk_in_numpy(w: dict[str, np.ndarray], x: np.ndarray) -> float:
    f = np.maximum(x @ w["W_enc"] + w["b_enc"], 0)
    strength = f * np.linalg.norm(w["W_dec"], axis=1)
    for row, here in zip(f, strength, strict=True):
        row[np.argsort(-here)[4:]] = 0
    return squared(x, f, w)


def strongest_of_batch(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    f = np.maximum(x @ w["W_enc"] + w["b_enc"], 0)
    strength = f * np.linalg.norm(w["W_dec"], axis=1)
    f[strength < np.sort(strength.ravel())[-4 * len(x)]] = 0
    return f


def batchtopk_in_numpy(w: dict[str, np.ndarray], x: np.ndarray) -> float:
    return squared(x, strongest_of_batch(w, x), w)


def matryoshka_in_numpy(w: dict[str, np.ndarray], x: np.ndarray) -> float:
    f, total = strongest_of_batch(w, x), 0.0
    for size in (5, 10, 20):
        prefix = f.copy()
        prefix[:, size:] = 0
        total += squared(x, prefix, w) / 3
    return total


def gated_in_numpy(w: dict[str, np.ndarray], x: np.ndarray, held: dict[str, np.ndarray]) -> float:
    product = x @ w["W_enc"]
    gate = product + w["b_gate"]
    f = np.maximum(product * np.exp(w["r_mag"]) + w["b_mag"], 0) * (gate > 0)
    opened = np.maximum(gate, 0)
    sparsity = (opened * np.linalg.norm(held["W_dec"], axis=1)).sum(axis=1).mean()
    return squared(x, f, w) + 2.0 * sparsity + squared(x, opened, held)


INDEPENDENT: dict[str, Callable[[dict[str, np.ndarray], np.ndarray], float]] = {
    "relu": relu_in_numpy,
    "topk": topk_in_numpy,
    "batchtopk": batchtopk_in_numpy,
    "matryoshka": matryoshka_in_numpy,
}


def independent(name: str, coder: Coder) -> Callable[[dict[str, np.ndarray], np.ndarray], float]:
    if name == "gated":  # the decoder of penalty and gate stands still
        held = weights(coder)
        return lambda w, x: gated_in_numpy(w, x, held)
    return INDEPENDENT[name]


@pytest.mark.parametrize("name", ["relu", "topk", "batchtopk", "matryoshka", "gated"])
def test_the_loss_and_its_gradient_agree_with_finite_differences_of_the_formula(name: str):
    coder, x = made(name), inputs()
    total = coder.losses(x, x, WHOLE).total
    total.backward()
    w, rows, step, formula = weights(coder), x.double().numpy(), 1e-6, independent(name, coder)
    assert total.item() == pytest.approx(formula(w, rows), rel=1e-5)
    for key, parameter in coder.named_parameters():
        gradient = np.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.numpy().ravel()
        for index in np.random.default_rng(0).choice(gradient.size, min(8, gradient.size), replace=False):
            ends = []
            for sign in (1, -1):
                moved = {name: value.copy() for name, value in w.items()}
                moved[key].ravel()[index] += sign * step
                ends.append(formula(moved, rows))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert gradient[index] == pytest.approx(slope, rel=1e-3, abs=1e-4), (key, index)


def test_the_penalty_of_the_paper_pulls_at_the_decoder_norm():
    """Along each row's own direction: the gradient that keeps features from shrinking while the decoder grows."""
    coder, x = made("relu"), inputs()
    coder.losses(x, x, WHOLE).total.backward()
    w, rows, step = weights(coder), x.double().numpy(), 1e-6
    for feature in range(coder.d_sae):
        direction = w["W_dec"][feature] / np.linalg.norm(w["W_dec"][feature])
        ends = []
        for sign in (1, -1):
            moved = {**w, "W_dec": w["W_dec"].copy()}
            moved["W_dec"][feature] += sign * step * direction
            ends.append(relu_in_numpy(moved, rows))
        along = coder.W_dec.grad[feature].double().numpy() @ direction
        assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-4)


def test_the_jump_has_the_gradient_that_was_published():
    """Rajamanoharan et al. 2024: a ramp of width `bandwidth` around the threshold, for it and for the pre-activation."""
    coder, x = made("jumprelu"), inputs(400)
    losses = coder.losses(x, x, WHOLE)
    losses.total.backward()
    w, rows, settings = weights(coder), x.double().numpy(), SETTINGS["jumprelu"]
    z = rows @ w["W_enc"] + w["b_enc"]
    theta, width, norms = w["threshold"], settings.bandwidth, np.linalg.norm(w["W_dec"], axis=1)
    f = np.maximum(z, 0) * (z > theta)
    inside = (np.abs(z - theta) < width / 2) / width
    n = len(rows)
    # dL/df of reconstruction and tanh sparsity
    upstream = -2 * (rows - f @ w["W_dec"] - w["b_dec"]) @ w["W_dec"].T / n
    tanh = np.tanh(settings.tanh_scale * f * norms)
    upstream += settings.sparsity_coefficient * settings.tanh_scale * norms * (1 - tanh**2) / n
    below = settings.pre_activation_coefficient * norms * (theta > z) / n
    expected = (-upstream * np.maximum(z, 0) * inside + below).sum(axis=0)
    np.testing.assert_allclose(coder.threshold.grad, expected, rtol=1e-3, atol=1e-5)
    into_z = upstream * ((z > 0) * (z > theta) + np.maximum(z, 0) * inside) - below
    np.testing.assert_allclose(coder.W_enc.grad, rows.T @ into_z, rtol=1e-3, atol=1e-4)
    loss = squared(rows, f, w) + tanh.sum(axis=1).mean() + 0.01 * (np.maximum(theta - z, 0) @ norms).mean()
    assert losses.total.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("wanted", [2.0, 10.0])
def test_a_wanted_l0_pushes_thresholds_towards_it(wanted: float):
    settings = JumpReLUSettings(
        d_sae=20, bandwidth=0.3, sparsity="target_l0", target_l0=wanted, sparsity_coefficient=100.0, sparsity_warmup=0.0
    )
    coder, x = JumpReLUSAE.autoencoder(settings, 6), inputs(200)
    coder.load_state_dict(made("jumprelu").state_dict())
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    for _ in range(300):
        losses = coder.losses(x, x, WHOLE)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        coder.after_step()
    assert coder.encode(x).active().float().mean().item() == pytest.approx(wanted, rel=0.1)


def test_the_frequency_penalty_has_the_gradient_of_its_formula_and_quietens_what_fires_everywhere():
    settings = JumpReLUSettings(
        d_sae=20, bandwidth=0.5, sparsity="l0", sparsity_coefficient=0.2, frequency_coefficient=0.3, frequency_scale=0.1,
        decoder_init_norm=0.1,  # so short that thresholds are near what features have, where they have a gradient
    )  # fmt: skip
    coder, x = JumpReLUSAE.autoencoder(settings, 6), inputs()
    coder.initialise(3)
    found = coder.losses(x, x, WHOLE)
    found.terms["frequency"].backward()
    z = (x @ coder.W_enc + coder.b_enc).detach().double().numpy()
    theta = coder.threshold.detach().double().numpy()
    p = (z > theta).mean(axis=0)
    assert found.terms["frequency"].item() == pytest.approx((p**2).sum() / 0.1, rel=1e-5)
    assert found.terms["sparsity"].item() == pytest.approx((z > theta).sum(axis=1).mean(), rel=1e-6)
    slope = -((np.abs(z - theta) < 0.25) / 0.5).mean(axis=0)
    np.testing.assert_allclose(coder.threshold.grad, 2 * p / 0.1 * slope, rtol=1e-4, atol=1e-6)
    assert set(coder.losses(x, x, WHOLE).weights) == {"reconstruction", "sparsity", "pre_activation", "frequency"}
    shares = []
    for coefficient in (0.0, 1.0):
        trained = JumpReLUSAE.autoencoder(settings.model_copy(update={"frequency_coefficient": coefficient}), 6)
        trained.initialise(3)
        optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
        data = inputs(400, 6) + 2.0  # a mean that some features would fire on always
        for _ in range(200):
            optimizer.zero_grad()
            trained.losses(data, data, WHOLE).total.backward()
            optimizer.step()
            trained.after_step()
        shares.append(trained.encode(data).fired().max().item() / 400)
    assert shares[1] < 0.7 * shares[0]


def test_the_sparsity_product_is_float32_under_autocast():
    """The loss is promised in float32. A bfloat16 product of means and norms has two or three digits."""
    coder, x = ReLUSAE.autoencoder(ReLUSettings(d_sae=512), 64), torch.randn(256, 64)
    coder.initialise(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = coder.losses(x, x, WHOLE)
        features = coder.encode(x).values
    expected = features.double().mean(dim=0) @ coder.W_dec.detach().double().norm(dim=1)
    assert found.terms["sparsity"].item() == pytest.approx(expected.item(), rel=1e-5)
    y_hat = torch.nn.functional.linear(features, coder.W_dec.T.bfloat16(), coder.b_dec.bfloat16()).double()
    assert found.terms["reconstruction"].item() == pytest.approx((x - y_hat).square().sum(dim=1).mean().item(), rel=1e-5)


def test_dead_features_learn_what_the_living_leave_over_and_the_living_nothing_of_it():
    coder, x = made("topk"), inputs()
    dead = torch.zeros(20, dtype=torch.bool)
    dead[[2, 7, 11]] = True
    before = coder.pre_activations(x).detach().requires_grad_()
    residual = torch.randn(50, 6, generator=torch.Generator().manual_seed(8), requires_grad=True)
    rows = coder.W_dec.detach().requires_grad_()
    loss = auxk_loss(before, dead, residual, rows, 2)
    loss.backward()
    assert residual.grad is None
    assert not rows.grad[~dead].any()
    assert rows.grad[dead].any()
    e, z, w = (value.detach().double().numpy() for value in (residual, before, rows))
    written = np.zeros_like(e)
    for token in range(50):
        best = sorted((2, 7, 11), key=lambda feature: -z[token, feature])[:2]
        written[token] = sum(max(z[token, feature], 0) * w[feature] for feature in best)
    expected = 6 * ((e - written) ** 2).sum() / ((e - e.mean(axis=0)) ** 2).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    nobody = auxk_loss(before, torch.zeros(20, dtype=torch.bool), residual, rows, 2)
    assert nobody.item() == 0.0


def test_the_decoder_starts_with_the_norm_that_was_asked_for_and_the_encoder_as_its_transpose():
    for kind in architectures().values():
        coder = kind.autoencoder(kind.Settings(d_sae=64, decoder_init_norm=0.3), 16)
        coder.initialise(seed=0)
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.full((64,), 0.3))
        torch.testing.assert_close(coder.W_enc, coder.W_dec.T)
        assert not coder.b_dec.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_folding_keeps_the_function_and_makes_decoder_rows_unit_vectors(name: str):
    coder, x, scale = made(name), inputs(), 0.37
    with torch.no_grad():
        coder.W_dec[7] = 0  # a feature without a direction must not become NaN
        folded = coder.folded([scale], [scale])
        raw = x / scale
        torch.testing.assert_close(folded(raw), coder(x) / scale, rtol=1e-4, atol=1e-5)
        norms = folded.W_dec.norm(dim=1)
        torch.testing.assert_close(norms[norms > 0], torch.ones(19))
        # the paper's feature activation: what a feature adds to the reconstruction, in length
        added = coder.encode(x).dense() * coder.W_dec.norm(dim=1) / scale
        alive = torch.arange(20) != 7
        torch.testing.assert_close(folded.encode(raw).dense()[:, alive], added[:, alive], rtol=1e-4, atol=1e-5)


def test_a_coder_of_several_columns_is_folded_with_the_scale_of_each():
    reads, writes = (Column("a", 4), Column("b", 3)), (Column("c", 5), Column("d", 2))
    coder = ReLUSAE(ReLUSettings(d_sae=30, decoder_init_norm=0.5), reads, writes, 30)
    coder.initialise(1)
    x = torch.randn(40, 7)
    scales_in, scales_out = [0.5, 3.0], [2.0, 0.25]
    folded = coder.folded(scales_in, scales_out)
    given = x / torch.tensor([0.5] * 4 + [3.0] * 3)
    with torch.no_grad():
        torch.testing.assert_close(folded(given), coder(x) / torch.tensor([2.0] * 5 + [0.25] * 2), rtol=1e-4, atol=1e-5)
    # as long as training saw them: else a coder that ranks by length would rank otherwise afterwards
    seen = folded.W_dec * torch.tensor([2.0] * 5 + [0.25] * 2) / 2.0
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(30))
    torch.testing.assert_close(folded.row_norms(), torch.ones(30))


@pytest.mark.parametrize("name", SETTINGS)
def test_an_artifact_loads_as_the_same_function(name: str, tmp_path: Path):
    coder = made(name).folded([1.0], [1.0]).requires_grad_(False)
    write(coder, tmp_path)
    loaded = load_saelens(tmp_path, CPU)
    found, expected = loaded.encode(inputs()).dense(), coder.encode(inputs()).dense()
    # BatchTopK leaves as JumpReLU: the threshold itself is rounded once more.
    assert ((found > 0) != (expected > 0)).float().mean() < 1e-3
    torch.testing.assert_close(loaded(inputs()), coder(inputs()), rtol=1e-6, atol=1e-6)
    if name in ("relu", "topk", "jumprelu", "gated"):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def write(coder: Coder, folder: Path, **changed: object) -> None:
    for name, content in saelens_files(coder, {}).items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changed}))


def test_the_papers_artifact_holds_four_tensors(tmp_path: Path):
    write(made("relu"), tmp_path)
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec"}


def test_relu_arrives_at_the_l0_that_was_asked_for_whatever_the_data():
    """On two data sets on which one lambda gives very different L0s: dense and sparse mixtures of random directions."""
    found = {}
    for active in (4, 16):
        generator = torch.Generator().manual_seed(active)
        directions = torch.randn(64, 32, generator=generator)
        mixed = (torch.rand(20_000, 64, generator=generator) < active / 64) * torch.rand(20_000, 64, generator=generator)
        x = mixed @ directions
        x *= (32 / x.square().sum(dim=1).mean()) ** 0.5
        for target in (None, 6.0):
            settings = ReLUSettings(d_sae=128, sparsity_coefficient=1.0, target_l0=target)
            coder = ReLUSAE.autoencoder(settings, 32)
            coder.initialise(0)
            optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
            for step in range(1_200):
                batch = x[step * 256 % 19_000 :][:256]
                coder.losses(batch, batch, Progress(step, 1_200)).total.backward()
                optimizer.step()
                optimizer.zero_grad()
                coder.after_step()
            found[active, target] = coder.encode(x[:4_000]).active().float().mean().item()
    assert found[16, None] > 1.3 * found[4, None]
    assert found[4, 6.0] == pytest.approx(6.0, rel=0.1)
    assert found[16, 6.0] == pytest.approx(6.0, rel=0.1)


def test_lambda_on_its_way_to_an_l0_is_kept_and_does_not_leave_the_project(tmp_path: Path):
    coder = ReLUSAE.autoencoder(ReLUSettings(d_sae=20, target_l0=2.0), 6)
    coder.initialise(3)
    before = coder.losses(inputs(), inputs(), WHOLE).weights["sparsity"]
    coder.after_step()
    after = coder.losses(inputs(), inputs(), WHOLE).weights["sparsity"]
    assert after > before > 5.0
    again = ReLUSAE.autoencoder(coder.settings, 6)
    again.load_state_dict(coder.state_dict())
    assert again.losses(inputs(), inputs(), WHOLE).weights["sparsity"] == after
    write(coder, tmp_path)
    torch.testing.assert_close(load_saelens(tmp_path, CPU)(inputs()), coder(inputs()))
    again.load_exported(coder.exported().tensors)
    assert "growth" not in coder.exported().tensors
    with pytest.raises(ValueError, match="sparsity_coefficient is 0, which does not grow"):
        ReLUSettings(sparsity_coefficient=0, target_l0=5)


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_an_artifact_that_subtracts_the_decoder_bias_first_is_understood(name: str, tmp_path: Path):
    coder, x = made(name), inputs()
    write(coder, tmp_path, apply_b_dec_to_input=True)
    with torch.no_grad():
        torch.testing.assert_close(load_saelens(tmp_path, CPU)(x), coder(x - coder.b_dec), rtol=1e-5, atol=1e-5)


# Choosing by rank, at its edges.


def ranked(kind: type[Coder], d_sae: int = 8, **more: object) -> Coder:
    coder = kind.autoencoder(kind.Settings(d_sae=d_sae, **more), d_sae)
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(d_sae))
        coder.W_dec.copy_(torch.eye(d_sae))
    return coder.requires_grad_(False)


def test_k_larger_than_the_number_of_features_takes_all_that_are_positive():
    x = torch.tensor([[1.0, -1, 2, 0, 3, -2, 0.5, 4]])
    for kind in (TopKSAE, BatchTopKSAE):
        coder = ranked(kind, k=100, auxk_coefficient=0.0)
        features = coder.losses(x, x, WHOLE).features
        assert features.active().tolist() == [5]
        torch.testing.assert_close(features.dense(), x.relu())


def test_a_token_without_a_positive_feature_has_none():
    x = -torch.ones(3, 8)
    for kind in (TopKSAE, BatchTopKSAE):
        coder = ranked(kind, k=4, auxk_coefficient=0.0)
        found = coder.losses(x, x, WHOLE)
        assert found.features.active().tolist() == [0, 0, 0]
        assert not found.features.dense().any()
        assert found.total.item() == pytest.approx(8.0)


def test_of_equal_features_exactly_k_are_taken():
    x = torch.ones(4, 8)
    assert ranked(TopKSAE, k=3).encode(x).active().tolist() == [3, 3, 3, 3]
    batch = ranked(BatchTopKSAE, k=3, auxk_coefficient=0.0).losses(x, x, WHOLE).features
    assert batch.active().sum().item() == 12


def test_inputs_of_any_number_of_dimensions_are_tokens():
    x = torch.randn(2, 3, 6)
    for name in SETTINGS:
        coder = made(name)
        assert coder(x).shape == x.shape
        torch.testing.assert_close(coder(x).reshape(6, 6), coder(x.reshape(6, 6)))
        assert len(coder.encode(x)) == 6


def test_a_batch_shares_its_k_features_and_the_threshold_keeps_their_number():
    generator = torch.Generator().manual_seed(0)
    coder = ranked(BatchTopKSAE, d_sae=64, k=5, auxk_coefficient=0.0, threshold_decay=0.9)
    for _ in range(60):
        x = torch.randn(512, 64, generator=generator) * torch.rand(512, 1, generator=generator)
        features = coder.losses(x, x, WHOLE).features
        coder.after_step()
        assert features.active().sum().item() == 5 * 512
    assert features.active().max() > 5
    x = torch.randn(4096, 64, generator=generator) * torch.rand(4096, 1, generator=generator)
    whole = coder.encode(x).active()
    assert whole.float().mean().item() == pytest.approx(5.0, rel=0.05)
    parts = torch.cat([coder.encode(part).active() for part in x.split(100)])
    assert torch.equal(parts, whole)  # no token's features depend on who stands beside it


def test_k_falls_to_its_end_where_that_is_asked_for():
    settings = TopKSettings(d_sae=20, k=4, k_start=12, k_anneal=0.5)
    assert [settings.k_at(Progress(step, 100)) for step in (0, 25, 50, 100)] == [12, 8, 4, 4]
