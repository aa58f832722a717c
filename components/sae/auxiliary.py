"""AuxK: dead features learn to write what the living ones leave over (Gao et al. 2024, section A.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from components.sae.features import SparseFeatures
from components.sae.kernels.asked import Asked
from components.sae.kernels.rows import uses_triton
from components.sae.kernels.sparse import Places

if TYPE_CHECKING:
    from components.sae.coder import Coder


def auxk_loss_of(
    coder: Coder, x: Tensor, before: Tensor | None, dead: Tensor, residual: Tensor, k: int, asked: Asked | None = None
) -> Tensor:
    """`auxk_loss` of a coder on x `[n, d_in]`. before: pre-activations of all features; without them those of dead features
    alone are computed. asked: how many those are."""
    if coder.mesh is not None:
        return _auxk_of_share(coder, x, before, dead, residual, k)
    k = min(k, coder.d_sae)
    if before is not None:
        return auxk_loss(before, dead, residual, coder.W_dec, k)
    count = (asked or Asked(dead)).answer()
    if count == 0:
        return residual.new_zeros((), dtype=torch.float32)
    # The dead ones first: `nonzero` would ask the device once more.
    places = torch.argsort(dead.logical_not(), stable=True)[:count] if dead.is_cuda else dead.nonzero().flatten()
    few = torch.nn.functional.linear(x, coder.W_enc.T[places], coder.read_bias(coder.b_enc)[places])
    loss = auxk_loss(few, torch.ones_like(places, dtype=torch.bool), residual, coder.W_dec[places], min(k, len(places)))
    return loss * min(1.0, len(places) / k)


def auxk_loss(pre_activations: Tensor, dead: Tensor, residual: Tensor, rows: Tensor, k: int) -> Tensor:
    """`E ||e - e_hat||^2 / E ||e - mean(e)||^2` times d_out, with e_hat written by the k dead features of largest
    pre-activation on each token, without a bias; 0 where no feature is dead.

    pre_activations `[n, d_sae]`, dead bool `[d_sae]`, residual `[n, d_out]`, rows `[d_sae, d_out]`. The residual is detached:
    the living features learn nothing from it. What is written is rectified, as of any feature; the gradient passes the
    rectifier, since a dead feature is below zero nearly everywhere. (Unrectified, some learn to write with negative
    activations, and stay dead.) Which features are dead is not asked of the device: with none the term is multiplied by 0.
    """
    k = min(k, pre_activations.shape[1])
    chosen = pre_activations.masked_fill(~dead, -torch.inf).topk(k, dim=1)
    return _loss_of(chosen.values, chosen.indices, dead, residual, rows, k)


def _loss_of(before: Tensor, features: Tensor, dead: Tensor, residual: Tensor, rows: Tensor, k: int) -> Tensor:
    """`auxk_loss` with these features of each token, `[n, k]` both; what is not finite is none."""
    error = residual.detach().float()
    written = _written(before, before.isfinite(), features, rows)
    spread = (error - error.mean(dim=0)).square().sum(dim=1).mean()
    loss = (error - written.float()).square().sum(dim=1).mean() / spread.clamp_min(torch.finfo(spread.dtype).tiny)
    # Few dead features cannot write all of it: without this they would be pulled apart by it.
    return loss * rows.shape[1] * (dead.sum() / k).clamp(max=1.0)


def _written(before: Tensor, kept: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """By features with pre-activations before `[n, k]`, those kept alone: `[n, d_out]`."""
    values = torch.where(kept, before, torch.zeros_like(before))
    values = values + (torch.relu(values) - values).detach()
    features = SparseFeatures.of_rows(values, indices, len(rows))
    if uses_triton(rows):
        features = replace(features, places=Places.of(features.indices, features.offsets, len(rows)))
    return features.decode(rows, rows.new_zeros(rows.shape[1]))


def _auxk_of_share(coder: Coder, x: Tensor, before: Tensor | None, dead: Tensor, residual: Tensor, k: int) -> Tensor:
    """`auxk_loss_of` where the other features, or the other tokens of the batch, are with other processes."""
    mesh = coder.mesh
    assert mesh is not None
    error, k = residual.detach().float(), min(k, coder.features_of_all)
    count = mesh.over_features(dead.sum())
    # On a CPU asking waits for nothing. The answer is the same for everybody, whatever pre-activations each has at hand.
    if x.device.type == "cpu" and not count:
        return error.new_zeros(())
    if before is None:
        places = dead.nonzero().flatten()
        before, rows = (
            torch.nn.functional.linear(x, coder.W_enc.T[places], coder.read_bias(coder.b_enc)[places]),
            coder.W_dec[places],
        )
    else:
        before, rows = before.masked_fill(~dead, -torch.inf), coder.W_dec
    chosen = before.topk(min(k, before.shape[1]), dim=1)
    kept = chosen.values.isfinite() & mesh.among_strongest(chosen.values, k)
    share = _written(chosen.values, kept, chosen.indices, rows) if len(rows) else torch.zeros_like(error)
    written = mesh.over_features(share)
    middle = mesh.over_tokens(error.mean(dim=0))
    spread = mesh.over_tokens((error - middle).square().sum(dim=1).mean())
    loss = (error - written.float()).square().sum(dim=1).mean() / spread.clamp_min(torch.finfo(spread.dtype).tiny)
    return loss * coder.d_out * (count / k).clamp(max=1.0)
