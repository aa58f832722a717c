"""What is chosen with a product in bfloat16 first is what a product in float64 would choose."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from components.sae.architectures import architectures
from components.sae.coder import Column, Losses, Progress
from components.sae.features import DenseFeatures, SparseFeatures
from components.sae.kernels import rectified, screening, selection
from components.sae.kernels.selection import strongest_of_batch, strongest_of_rows

K, D_SAE = 6, 512


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    """Screened at any size and on any CPU, by tiles of 64 tokens."""
    for name in ("_LEAST_WIDTH", "_LEAST_FEATURES", "_LEAST_TOKENS"):
        monkeypatch.setattr(screening, name, 1)
    monkeypatch.setattr(screening, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(selection, "_TILE_ENTRIES", 64 * D_SAE)


def inputs(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    x, W_enc = torch.randn(150, 40, generator=random), torch.randn(40, D_SAE, generator=random) / 6
    b_enc, norms = 0.1 * torch.randn(D_SAE, generator=random), 0.5 + torch.rand(D_SAE, generator=random)
    if kind == "far from zero":
        x += 20 * torch.randn(40, generator=random)
    elif kind == "uneven":
        x[:3] *= 200
    elif kind == "close together":  # what bfloat16 cannot tell apart
        W_enc = W_enc[:, :1] + 1e-4 * W_enc
        b_enc, norms = torch.zeros(D_SAE), torch.ones(D_SAE)
    elif kind == "wide and narrow":
        W_enc, norms = W_enc * 10 ** torch.linspace(-3, 1, D_SAE), norms * 10 ** torch.linspace(1, -3, D_SAE)
    return x, W_enc, b_enc, norms


KINDS = ("plain", "far from zero", "uneven", "close together", "wide and narrow")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normed", [True, False])
def test_of_each_token(kind: str, normed: bool):
    x, W_enc, b_enc, norms = inputs(kind)
    before, indices = strongest_of_rows(x, W_enc, b_enc, norms if normed else None, K)
    exact = x.double() @ W_enc.double() + b_enc.double()
    strengths = exact * norms if normed else exact
    assert all(len(set(row)) == K for row in indices.tolist())
    error = 1e-5 * x.norm(dim=1, keepdim=True) * (W_enc * norms if normed else W_enc).norm(dim=0).max()
    assert ((before - exact.gather(1, indices)).abs() <= 1e-5 * x.norm(dim=1, keepdim=True) * W_enc.norm(dim=0).max()).all()
    weakest, kth = strengths.gather(1, indices).amin(dim=1), strengths.topk(K, dim=1).values[:, -1]
    assert (weakest >= kth - error[:, 0]).all()  # of equal strength up to float32, either


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_batch(kind: str):
    x, W_enc, b_enc, norms = inputs(kind)
    before, places, weakest = strongest_of_batch(x, W_enc, b_enc, norms, K)
    exact = (x.double() @ W_enc.double() + b_enc.double()).flatten()
    strengths = torch.relu(exact) * norms.double().repeat(len(x))
    kth = strengths.topk(K * len(x)).values[-1]
    error = 1e-5 * x.norm(dim=1).max() * (W_enc * norms).norm(dim=0).max()
    assert len(places) == K * len(x)
    assert (places.diff() > 0).all()
    assert strengths[places].min() >= kth - error
    assert weakest.item() == pytest.approx(kth.item(), abs=error.item())
    assert (before - exact[places]).abs().max() <= 1e-5 * x.norm(dim=1).max() * W_enc.norm(dim=0).max()


def test_the_product_is_off_by_no_more_than_is_said_and_the_usual_case_needs_no_second_one(monkeypatch: pytest.MonkeyPatch):
    for kind in KINDS:
        x, W_enc, b_enc, norms = inputs(kind)
        rows = screening.Rows.of(W_enc.T, b_enc, norms, x.mean(dim=0))
        products, error = next(rows.products(x, len(x)))
        exact = (x.double() @ W_enc.double() + b_enc) * norms
        assert ((products.double() - exact).abs() <= error[:, None] + 2.0**-8 * products.double().abs()).all(), kind
    monkeypatch.setattr(selection._Products, "tiles", lambda *_: pytest.fail("a product in float32"))
    x, W_enc, b_enc, norms = inputs("plain")
    strongest_of_rows(x, W_enc, b_enc, norms, K)
    strongest_of_batch(x, W_enc, b_enc, norms, K)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_tokens_without_an_order_end_it_in_no_other_way(value: float):
    x, W_enc, _, norms = inputs("plain")
    x[:] = value
    before, indices = strongest_of_rows(x, W_enc, torch.zeros(D_SAE), norms, K)
    assert before.shape == indices.shape == (150, K)
    values, _, weakest = strongest_of_batch(x, W_enc, torch.zeros(D_SAE), norms, K)
    assert torch.relu(values).sum() == 0 or not values.isfinite().all()
    assert weakest == 0 or value != 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relu", {}), ("relu", {"auxk_coefficient": 0.1, "auxk": 3}), ("jumprelu", {"pre_activation_coefficient": 0.3}),
        ("jumprelu", {"sparsity": "target_l0", "target_l0": 3.0, "frequency_coefficient": 0.5}),
        ("jumprelu", {"sparsity": "l0", "frequency_coefficient": 0.5}),
    ],
)  # fmt: skip
def test_a_rectifiers_sparse_step_is_its_dense_one(name: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    """Every term and gradient; and it is taken where few features are over the bound alone."""
    kind = architectures()[name]
    settings = kind.Settings.model_validate({"architecture": name, "d_sae": 64, **options})
    monkeypatch.setattr(rectified, "LARGE", (1, 1))
    monkeypatch.setattr(kind, "by_feature_from", (1, 1))
    monkeypatch.setattr(rectified, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(rectified, "_TILE_ENTRIES", 64 * 64)
    coder = kind(settings, (Column("x", 12),), (Column("y", 9),), 64)
    coder.initialise(1)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random).abs()
        coder.b_enc -= 3
    x, y = torch.randn(150, 12, generator=random), torch.randn(150, 9, generator=random)

    def taken(share: float) -> tuple[Losses, dict[str, torch.Tensor]]:
        monkeypatch.setattr(rectified, "_PAYS_BELOW", share)
        found = coder.losses(x, y, Progress(10, 10, torch.arange(64) < 9))
        coder.zero_grad()
        found.total.backward()
        return found, {name: parameter.grad.clone() for name, parameter in coder.named_parameters()}

    dense, expected = taken(0.0)
    assert isinstance(dense.features, DenseFeatures)
    sparse, gradients = taken(0.99)
    assert isinstance(sparse.features, SparseFeatures)
    assert 0 < sparse.features.active().double().mean() < 32
    torch.testing.assert_close(sparse.features.dense(), dense.features.dense())
    assert set(sparse.terms) == set(dense.terms)
    for term, value in dense.terms.items():
        torch.testing.assert_close(sparse.terms[term].double(), value.double(), rtol=1e-5, atol=0)
    assert set(gradients) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-4, atol=1e-5)


def test_small_coders_keep_their_dense_step():
    """Theirs is quick, and weights that were trained before stay what they were."""
    assert not rectified.is_sparse(torch.zeros(1_024, 128), torch.zeros(128, 1_024), -torch.ones(1_024))
    assert rectified.is_sparse(torch.zeros(256, 256), torch.zeros(4_096, 256).T, -torch.ones(4_096))


@pytest.mark.parametrize("name", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_large_evaluation_holds_no_more_than_a_tile_and_finds_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    kind = architectures()[name]
    coder = kind.autoencoder(kind.Settings.model_validate({"architecture": name, "d_sae": 4_096}), 24)
    coder.initialise(3)
    x = torch.randn(512, 24, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        coder.b_enc += 0.01
        coder.fire_on(x, 0.01)
        if name == "batchtopk":
            coder.weakest.fill_(0.05)
        expected = coder.encode(x)
        monkeypatch.setattr(rectified, "MANY_ENTRIES", 1 << 20)
        for module in (rectified, selection):
            monkeypatch.setattr(module, "_TILE_ENTRIES", 1 << 18)
        written, fired = expected.decode(coder.W_dec, coder.b_dec), expected.fired()
        with LargestTensor() as largest:
            found = coder.encode(x)
            assert (found.decode(coder.W_dec, coder.b_dec) - written).abs().max() < 1e-4
            assert (found.fired() - fired).abs().sum() <= 2  # what is on the bound, but for rounding
            assert (found.sums() > 0).sum() == (found.largest() > 0).sum() > 0
            assert found.active().sum() == found.fired().sum()
    assert isinstance(found, SparseFeatures)
    assert largest.entries <= 1 << 19 < x.shape[0] * 4_096


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "relu"])
def test_a_step_holds_no_more_than_a_tile(name: str, monkeypatch: pytest.MonkeyPatch):
    for module in (rectified, selection):
        monkeypatch.setattr(module, "_TILE_ENTRIES", 1 << 18)
    monkeypatch.setattr(rectified, "LARGE", (1, 1))
    kind = architectures()[name]
    coder = kind.autoencoder(kind.Settings.model_validate({"architecture": name, "d_sae": 4_096}), 24)
    coder.initialise(3)
    x = torch.randn(1_024, 24, generator=torch.Generator().manual_seed(8))
    coder.fire_on(x, 0.01)
    with LargestTensor() as largest:
        coder.losses(x, x, Progress(1, 10, torch.arange(4_096) < 5)).total.backward()
    assert largest.entries <= 1 << 19 < x.shape[0] * 4_096 // 4


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.entries = max(self.entries, one.numel())
        return result
