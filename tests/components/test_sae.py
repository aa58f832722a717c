"""The SAE's loss, its gradient, and what is folded and saved, each against an independent computation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from components.sae.artifact import load_sae, sae_files
from components.sae.relu import ReLUSAE, relu_loss


@pytest.fixture
def sae() -> ReLUSAE:
    sae = ReLUSAE(6, 20)
    sae.initialise(0.7, seed=3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(5))


def weights(sae: ReLUSAE) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in sae.state_dict().items()}


def loss_in_numpy(w: dict[str, np.ndarray], x: np.ndarray, coefficient: float) -> float:
    """The paper's formula, token by token and feature by feature."""
    total = 0.0
    for row in x:
        pre = row @ w["W_enc"] + w["b_enc"]
        f = np.where(pre > 0, pre, 0)
        x_hat = sum(f[i] * w["W_dec"][i] for i in range(len(f))) + w["b_dec"]
        total += ((row - x_hat) ** 2).sum() + coefficient * sum(f[i] * np.linalg.norm(w["W_dec"][i]) for i in range(len(f)))
    return total / len(x)


def test_the_loss_is_the_papers_formula(sae, x):
    terms = relu_loss(sae, x, 3.0)
    assert terms.total.item() == pytest.approx(loss_in_numpy(weights(sae), x.double().numpy(), 3.0), rel=1e-5)
    assert terms.total.item() == pytest.approx(terms.reconstruction.item() + 3.0 * terms.sparsity.item())


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_the_gradient_agrees_with_finite_differences(sae, x, name: str):
    relu_loss(sae, x, 3.0).total.backward()
    gradient = getattr(sae, name).grad.numpy().ravel()
    w, rows, step = weights(sae), x.double().numpy(), 1e-6
    for index in np.random.default_rng(0).choice(gradient.size, min(6, gradient.size), replace=False):
        ends = []
        for sign in (1, -1):
            moved = {key: value.copy() for key, value in w.items()}
            moved[name].ravel()[index] += sign * step
            ends.append(loss_in_numpy(moved, rows, 3.0))
        assert gradient[index] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-4)


def test_the_gradient_in_the_decoder_norm_agrees_with_finite_differences(sae, x):
    """Along each row's own direction: the penalty must push every firing feature's decoder norm down."""
    relu_loss(sae, x, 3.0).total.backward()
    w, rows, step = weights(sae), x.double().numpy(), 1e-6
    for feature in range(sae.d_sae):
        direction = w["W_dec"][feature] / np.linalg.norm(w["W_dec"][feature])
        ends = []
        for sign in (1, -1):
            moved = {**w, "W_dec": w["W_dec"].copy()}
            moved["W_dec"][feature] += sign * step * direction
            ends.append(loss_in_numpy(moved, rows, 3.0))
        along = sae.W_dec.grad[feature].double().numpy() @ direction
        assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-4)


def test_the_decoder_starts_with_the_norm_that_was_asked_for_and_the_encoder_as_its_transpose():
    sae = ReLUSAE(16, 64)
    sae.initialise(0.1, seed=0)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((64,), 0.1))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_folding_keeps_the_function_and_makes_decoder_rows_unit_vectors(sae, x):
    with torch.no_grad():
        sae.W_dec[7] = 0  # a feature without a direction must not become NaN
        scale = 0.37
        folded = sae.folded(scale)
        raw = x / scale
        torch.testing.assert_close(folded(raw), sae(x) / scale)
        norms = folded.W_dec.norm(dim=1)
        torch.testing.assert_close(norms[norms > 0], torch.ones(19))
        # the paper's feature activation: what a feature adds to the reconstruction, in length
        added = sae.encode(x) * sae.W_dec.norm(dim=1) / scale
        alive = torch.arange(20) != 7
        torch.testing.assert_close(folded.encode(raw)[:, alive], added[:, alive])


def test_an_artifact_loads_as_the_same_function(sae, x, tmp_path: Path):
    for name, content in sae_files(sae, {"model_name": "m"}).items():
        (tmp_path / name).write_bytes(content)
    loaded = load_sae(tmp_path, torch.device("cpu"))
    torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=0)
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec"}


def test_an_artifact_that_subtracts_the_decoder_bias_first_is_understood(sae, x, tmp_path: Path):
    for name, content in sae_files(sae, {}).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "apply_b_dec_to_input": True}))
    expected = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(load_sae(tmp_path, torch.device("cpu"))(x), expected)


def test_an_artifact_of_another_architecture_is_refused(sae, tmp_path: Path):
    for name, content in sae_files(sae, {}).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "architecture": "gated"}))
    with pytest.raises(ValueError, match=r"architecture.*gated.*standard"):
        load_sae(tmp_path, torch.device("cpu"))
