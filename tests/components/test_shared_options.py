"""Options of every architecture: the decoder bias taken from what is read, and new weights in the active subspace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from components import steps
from components.activations.dataset.reader import ActivationReader
from components.interop.saelens import load_saelens, saelens_files
from components.run.config import parse_config
from components.run.specification import resolve
from components.sae.architectures import architectures
from components.sae.coder import Coder, Column, Progress
from components.settings import UserError
from components.training.beginning import principal_directions
from components.training.start import as_trained

CPU = torch.device("cpu")
NAMES = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
TWO = (Column("resid_post.0", 5), Column("resid_post.1", 4))


def made(name: str, columns: tuple[Column, ...] = TWO, **settings: object) -> Coder:
    k = {"k": 3} if name in ("topk", "batchtopk", "matryoshka") else {}
    kind = architectures()[name]
    coder = kind(kind.Settings.model_validate({"architecture": name, "d_sae": 24, **k, **settings}), columns, columns, 24)
    coder.initialise(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in coder.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.abs() if key == "threshold" else noise
    return coder


def tokens(count: int, coder: Coder) -> torch.Tensor:
    return 1.0 + torch.randn(count, coder.d_in, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_x_less_the_bias_and_the_bias_learns_from_it(name: str):
    """Loss and gradients against those of a plain coder that gets `x - b_dec`."""
    plain, found = made(name), made(name, subtract_decoder_bias=True)
    x = tokens(60, plain)
    progress = Progress(5, 10, torch.arange(24) % 3 == 0)
    expected = plain.losses(x - plain.b_dec, x, progress)
    losses = found.losses(x, x, progress)
    assert losses.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    expected.total.backward()
    losses.total.backward()
    for (key, parameter), other in zip(found.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_folded_saved_and_continued_as_the_same_function(name: str, tmp_path: Path):
    coder = made(name, subtract_decoder_bias=True)
    coder.losses(tokens(60, coder), tokens(60, coder), Progress(10, 10))
    coder.after_step()
    x, scale = torch.randn(40, coder.d_in, generator=torch.Generator().manual_seed(4)), [0.4, 2.0]
    expected, per_column = coder(x).detach(), torch.tensor([0.4] * 5 + [2.0] * 4)
    folded = coder.folded(scale, scale).requires_grad_(False)
    torch.testing.assert_close(folded(x / per_column), expected / per_column, rtol=1e-4, atol=1e-4)
    for file, content in saelens_files(folded, {}).items():
        (tmp_path / file).write_bytes(content)
    torch.testing.assert_close(load_saelens(tmp_path, CPU)(x / per_column), expected / per_column, rtol=1e-4, atol=1e-4)
    again = as_trained(type(coder)(coder.settings, coder.reads, coder.writes, 24), tmp_path, scale, scale)
    assert again.subtracts
    torch.testing.assert_close(again(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["relu", "batchtopk", "gated"])
def test_a_training_with_it_goes_through_the_line(name: str, tiny_tree: dict):
    tiny_tree["sae"] |= {"architecture": name, "subtract_decoder_bias": True, "decoder_bias_init": "mean"}
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    record = steps.train(plan)
    assert record.curves[-1]["explained_variance"] > record.curves[0]["explained_variance"]
    continued = {**tiny_tree, "training": {**tiny_tree["training"], "start_from": plan.sae_url}}
    first = steps.train(resolve(parse_config(continued))).curves[0]
    assert first["explained_variance"] > record.curves[-1]["explained_variance"] - 0.05


def test_a_transcoder_has_no_bias_to_subtract(tiny_tree: dict):
    tiny_tree["activations"]["hook_points"] = ["mlp_in.1", "mlp_out.1"]
    tiny_tree["training"] |= {"hook_point": "mlp_in.1", "target": "mlp_out.1"}
    tiny_tree["sae"]["subtract_decoder_bias"] = True
    with pytest.raises(UserError, match=r"sae.subtract_decoder_bias: true is accepted"):
        resolve(parse_config(tiny_tree))


def test_principal_directions_are_those_of_a_singular_value_decomposition():
    generator = np.random.default_rng(0)
    rows = (
        generator.standard_normal((300, 8)) * [5, 4, 3, 2, 1, 0.1, 0.01, 0] @ np.linalg.qr(generator.standard_normal((8, 8))).Q
    )
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    held = np.cumsum(values**2) / np.sum(values**2)
    for share in (0.3, 0.9, 0.999, 1.0):
        found = principal_directions(torch.from_numpy(rows), share).numpy()
        wanted = directions[: int(np.searchsorted(held, share - 1e-12)) + 1]
        np.testing.assert_allclose(found @ found.T, wanted.T @ wanted, atol=1e-6)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_new_weights_lean_towards_tokens(share: float, tiny_tree: dict):
    tiny_tree["training"] |= {"learning_rate": 1e-30, "tokens": 256}
    coders = []
    for fields in ({}, {"decoder_token_share": share}):
        plan = resolve(parse_config({**tiny_tree, "sae": {"d_sae": 64, "decoder_bias_init": "mean", **fields}}))
        manifest = steps.extract(plan)
        steps.train(plan)
        coders.append(load_saelens(Path(plan.sae_url), CPU).W_dec.double().numpy())
    random, leaning = coders
    reader = ActivationReader(
        url=plan.dataset_url, manifest=manifest, columns=("resid_post.1",), batch_size=16_384, seed=plan.config.seed
    )
    batches = reader.batches()
    rows = next(batches)["resid_post.1"].double().numpy() - np.array(manifest.columns[0].mean)
    batches.close()
    tokens = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    # What is left of a row without its random part is some token's direction, another one for each row.
    for own, row in zip(random, leaning, strict=True):
        mixed = (1 - share) * own + share * tokens
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        assert (mixed @ row).max() > 1 - 1e-4
    assert len(np.unique(np.round(leaning @ tokens.T, 4).argmax(axis=1))) > 32


@pytest.mark.parametrize("bias", ["zeros", "mean"])
def test_new_weights_begin_in_the_active_subspace(bias: str, tiny_tree: dict):
    tiny_tree["activations"]["hook_points"] = ["attn_out.1"]
    tiny_tree["training"] |= {"learning_rate": 1e-30, "tokens": 256}
    tiny_tree["sae"] |= {"active_subspace": 0.9, "decoder_bias_init": bias}
    plan = resolve(parse_config(tiny_tree))
    manifest = steps.extract(plan)
    steps.train(plan)
    coder = load_saelens(Path(plan.sae_url), CPU)
    reader = ActivationReader(
        url=plan.dataset_url, manifest=manifest, columns=("attn_out.1",), batch_size=16_384, seed=plan.config.seed
    )
    batches = reader.batches()
    rows = next(batches)["attn_out.1"].double().numpy()
    batches.close()
    if bias == "mean":
        rows = rows - np.array(manifest.columns[0].mean)
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    kept = int(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), 0.9)) + 1
    assert 1 < kept < 32
    inside = coder.W_dec.double().numpy() @ directions[:kept].T
    np.testing.assert_allclose(np.linalg.norm(inside, axis=1), 1.0, atol=1e-3)
    assert np.linalg.matrix_rank(inside, tol=0.1) == kept
    columns = torch.nn.functional.normalize(coder.W_enc.T, dim=1)
    torch.testing.assert_close(columns, torch.nn.functional.normalize(coder.W_dec, dim=1), atol=1e-4, rtol=0)
