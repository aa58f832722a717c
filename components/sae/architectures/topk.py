"""TopK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders"): the k strongest features of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from components.sae.auxiliary import auxk_loss_of
from components.sae.coder import Coder, Exported, Losses, Progress, reconstruction_loss
from components.sae.features import SparseFeatures
from components.sae.kernels import rectified
from components.sae.kernels.selection import strongest_of_rows
from components.sae.kernels.sparse import Places, encoded, goes_by_the_chosen
from components.sae.settings import CoderSettings, FromTokens

_SAME_LENGTH = 1e-5
"""Relative difference that rounding to float32 leaves between equal lengths."""


class KSettings(CoderSettings):
    """What architectures share that choose by rank."""

    version = 2  # of 1, dead features wrote with negative activations in AuxK

    decides = (*CoderSettings.decides, "k", "auxk_coefficient", "auxk", "k_start", "k_anneal")

    k: int = Field(default=32, ge=1)
    """Active features per token, at most: a feature whose pre-activation is not positive stays off."""

    decoder_init_norm: float = Field(default=1.0, gt=0)
    """Norm of each decoder row at the start; its direction is random."""

    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the loss by which dead features learn (AuxK), in units of the residual's variance; 0 for none."""

    auxk: int | None = Field(default=None, ge=1)
    """Dead features per token that take part in it; half of the width of what is written where it is not given."""

    k_start: int | None = Field(default=None, ge=1)
    """Active features per token at the start of training, falling linearly to `k`; `k` from the start where not given."""

    k_anneal: float = Field(default=0.1, ge=0, le=1)
    """Share of training over which `k_start` falls to `k`."""

    def k_at(self, progress: Progress) -> int:
        if self.k_start is None:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * progress.rise(self.k_anneal))


class TopKSettings(FromTokens, KSettings):
    version = 3  # of 2, decoder rows began random and of length 1, the bias at zero

    decides = (*KSettings.decides, "rank_by")

    architecture: Literal["topk"] = "topk"
    """The k strongest features of each token (Gao et al. 2024)."""

    rank_by: Literal["length", "activation"] = "length"
    """What is strong: `f_i ||W_dec_i||`, which is what a feature adds to the reconstruction, or `f_i` alone."""


class TopKSAE(Coder):
    """`f(x) = TopK(ReLU(x W_enc + b_enc))`."""

    parallel = True
    Settings = TopKSettings
    settings: TopKSettings
    by_feature_from = (0, 0)

    def encode(self, x: Tensor) -> SparseFeatures:
        if self.mesh is None and rectified.without_gradient(x := x.reshape(-1, self.d_in), self.W_enc):
            return self._chosen(x, self.settings.k)
        return self._strongest(self.pre_activations(x.reshape(-1, self.d_in)), self.settings.k)

    def _strongest(self, pre_activations: Tensor, k: int) -> SparseFeatures:
        with torch.no_grad():
            strength = torch.relu(pre_activations)
            if self.settings.rank_by == "length":
                strength = strength * self.row_norms()
            indices = strength.topk(min(k, self.d_sae), dim=1, sorted=False).indices
            kept = None if self.mesh is None else self.mesh.among_strongest(strength.gather(1, indices), k)
        values = torch.relu(pre_activations.gather(1, indices))
        return SparseFeatures.of_rows(values if kept is None else values * kept, indices, self.d_sae)

    def losses(self, x: Tensor, y: Tensor, progress: Progress) -> Losses:
        k = self.settings.k_at(progress)
        if goes_by_the_chosen(x, self.d_sae, self.mesh is None):
            before, features = None, self._chosen(x, k)
        else:
            before = self.pre_activations(x)
            features = self._strongest(before, k)
        return with_auxk(self, self.settings, x, before, features, y, self.write(features, x), progress)

    def _chosen(self, x: Tensor, k: int) -> SparseFeatures:
        """`_strongest` without the pre-activations of the others."""
        norms = self.row_norms().detach() if self.settings.rank_by == "length" else None
        values, indices = strongest_of_rows(x, self.W_enc, self.read_bias(self.b_enc), norms, k)
        if self.mesh is None:
            offsets = torch.arange(len(x) + 1, device=x.device) * indices.shape[1]
            return chosen_features(self, x, values.flatten(), indices.flatten(), offsets)
        strengths = torch.relu(values) if norms is None else torch.relu(values) * norms[indices]
        kept = self.mesh.among_strongest(strengths, k)
        offsets = torch.nn.functional.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
        return chosen_features(self, x, values[kept], indices[kept], offsets)

    def exported(self) -> Exported:
        return Exported("topk", dict(self.state_dict()), {"k": self.settings.k})

    def load_exported(self, tensors: Mapping[str, Tensor]) -> None:
        """What is exported ranks by activation: by length only where all decoder rows are equally long."""
        norms = self.row_norms(tensors["W_dec"].double())
        norms = norms[norms > 0]
        if len(norms) and norms.max() - norms.min() > _SAME_LENGTH * norms.max():
            raise ValueError(
                "it ranks features by activation and its decoder rows differ in length; accepted is one length for all"
            )
        super().load_exported(tensors)


def chosen_features(coder: Coder, x: Tensor, before: Tensor, indices: Tensor, offsets: Tensor) -> SparseFeatures:
    """Features of x that were chosen without a gradient, by pre-activations before and indices `[m]`, with their gradient."""
    places = Places.of(indices, offsets, coder.d_sae)
    values = torch.relu(encoded(x, coder.W_enc, coder.read_bias(coder.b_enc), before, places))
    return SparseFeatures(values, indices, offsets, coder.d_sae, places)


def with_auxk(
    coder: Coder,
    settings: KSettings,
    x: Tensor,
    before: Tensor | None,
    features: SparseFeatures,
    y: Tensor,
    y_hat: Tensor,
    progress: Progress,
) -> Losses:
    """The reconstruction loss, and AuxK where it is wanted. before: see `auxk_loss_of`."""
    terms, weights = {"reconstruction": reconstruction_loss(y, y_hat)}, {"reconstruction": 1.0}
    if settings.auxk_coefficient > 0 and progress.dead is not None:
        k = settings.auxk or max(1, coder.d_out // 2)
        terms["auxk"] = auxk_loss_of(coder, x, before, progress.dead, y - y_hat, k, progress.dead_count)
        weights["auxk"] = settings.auxk_coefficient
    return Losses(terms, weights, features.detach())
