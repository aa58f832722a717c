"""Sparse steps against the dense formulas in float64, and against the dense path of the same coders."""

from __future__ import annotations

import pytest
import torch

from components.sae.architectures import architectures
from components.sae.coder import Coder, Column, Progress
from components.sae.kernels import selection
from components.sae.kernels.selection import strongest_of_batch, strongest_of_rows
from components.training.job import Training
from components.training.settings import TrainingSettings
from components.training.step import new_coder, take_step

NAMES = ("topk", "batchtopk", "matryoshka")


def made(name: str, **options: object) -> Coder:
    kind = architectures()[name]
    settings = kind.Settings.model_validate({"architecture": name, "d_sae": 60, "k": 5, "auxk": 3, **options})
    coder = kind(settings, (Column("x", 12),), (Column("y", 9),), 60)
    coder.initialise(1)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return coder.double()


def batch(count: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 12, generator=generator).double(), torch.randn(count, 9, generator=generator).double()


def losses(coder: Coder, x: torch.Tensor, y: torch.Tensor, dead: torch.Tensor | None):
    found = coder.losses(x, y, Progress(10, 10, dead))
    coder.zero_grad()
    found.total.backward()
    return found, {name: parameter.grad.clone() for name, parameter in coder.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dead", [None, 0, 2, 20])
@pytest.mark.parametrize("skip", [False, True])
def test_every_term_and_gradient_is_that_of_the_dense_formula(
    name: str, dead: int | None, skip: bool, monkeypatch: pytest.MonkeyPatch
):
    coder, (x, y) = made(name, skip=skip), batch()
    silent = None if dead is None else torch.arange(60) < dead
    sparse, gradients = losses(coder, x, y, silent)
    for module in ("topk", "batchtopk"):
        monkeypatch.setattr(f"components.sae.architectures.{module}.goes_by_the_chosen", lambda *_: False)
    dense, expected = losses(coder, x, y, silent)
    torch.testing.assert_close(sparse.features.dense(), dense.features.dense())
    for term, value in dense.terms.items():
        torch.testing.assert_close(sparse.terms[term], value)
    assert set(gradients) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-9, atol=1e-12)
    coder.after_step()
    if name != "topk":
        assert coder.weakest > 0


@pytest.mark.parametrize("tile", [1, 1 << 24])
def test_the_strongest_of_a_token_are_those_of_a_sort(tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "_TILE_ENTRIES", tile)
    coder, (x, _) = made("topk"), batch(200)
    norms = coder.row_norms().detach()
    before, indices = strongest_of_rows(x, coder.W_enc, coder.b_enc, norms, 5)
    every = x @ coder.W_enc + coder.b_enc
    expected = (every * norms).argsort(dim=1, descending=True)[:, :5]
    assert torch.equal(indices.sort(dim=1).values, expected.sort(dim=1).values)
    torch.testing.assert_close(before, every.gather(1, indices))


@pytest.mark.parametrize("uneven", [False, True])
def test_the_strongest_of_a_batch_are_those_of_one_sort_however_they_are_spread(uneven: bool):
    coder, (x, _) = made("batchtopk"), batch(64)
    if uneven:  # a few tokens take nearly all: more than the candidates of each
        x[:4] *= 1000
    norms = coder.row_norms().detach()
    before, places, weakest = strongest_of_batch(x, coder.W_enc, coder.b_enc, norms, 2)
    every = x @ coder.W_enc + coder.b_enc
    strengths = (torch.relu(every) * norms).flatten()
    expected = strengths.argsort(descending=True)[:128]
    assert torch.equal(places, expected.sort().values)
    torch.testing.assert_close(before, every.flatten()[places])
    assert weakest.item() == pytest.approx(strengths[expected].min().item())
    if uneven:
        assert (places // 60 == 0).sum() > 8


@pytest.mark.parametrize("case", ["even", "sample too weak", "sample too strong", "twins", "crowded"])
def test_a_bound_from_a_sample_changes_no_bit_of_what_is_chosen(case: str, monkeypatch: pytest.MonkeyPatch):
    coder, (x, _) = made("batchtopk").float(), batch(320)
    x, asked = x.float(), []
    if case == "sample too weak":
        x[::16] *= 1e-3
    elif case == "sample too strong":
        x[::16] *= 1e3
    elif case == "twins":  # of which some are chosen and some are not
        x[:] = x[0]
    elif case == "crowded":
        x[5:9] *= 100
    likely = selection._likely
    monkeypatch.setattr(selection, "_likely", lambda *given: asked.append(likely(*given)) or asked[-1])
    norms = coder.row_norms().detach()
    found = strongest_of_batch(x, coder.W_enc, coder.b_enc, norms, 2)
    monkeypatch.setattr(selection, "_likely", lambda *_: None)
    expected = strongest_of_batch(x, coder.W_enc, coder.b_enc, norms, 2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (asked[0] is None) == (case in ("sample too weak", "sample too strong"))


def test_all_negative_rows_and_features_that_write_nothing_give_nothing_that_is_not_finite():
    for name in NAMES:
        coder, (x, y) = made(name), batch()
        with torch.no_grad():
            coder.b_enc.fill_(-1e3)
            coder.W_dec[7] = 0
        found, gradients = losses(coder, x, y, torch.arange(60) < 4)
        assert found.total.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert not found.features.active().any()


def test_a_restored_optimizer_goes_on_with_the_same_bits():
    settings = TrainingSettings(tokens=64 * 20, batch_size=64, learning_rate=1e-2)
    coder = architectures()["topk"].Settings(d_sae=60, k=5)
    job = Training(
        url="", digest="", identity={}, settings=settings, coder=coder, dataset_url="", reads=("x",), writes=("x",), seed=0,
        metadata={},
    )  # fmt: skip
    column, batches = (Column("x", 12),), torch.randn(20, 64, 12, generator=torch.Generator().manual_seed(4))
    whole, first, second = (new_coder(job, column, column, torch.device("cpu")) for _ in range(3))
    for x in batches:
        take_step(whole, settings, x, x, torch.zeros(12), measured=False)
    for x in batches[:9]:
        take_step(first, settings, x, x, torch.zeros(12), measured=False)
    second.restore({name: value.detach().clone().contiguous() for name, value in first.tensors().items()}, 9, [])
    for x in batches[9:]:
        take_step(second, settings, x, x, torch.zeros(12), measured=False)
    for name, value in whole.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name
