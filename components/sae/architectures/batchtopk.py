"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the k n strongest features of a batch of n tokens.

A token takes as many as it needs. Away from training there is no batch to rank in: a feature then fires over a threshold,
the running mean of the weakest activation that was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.sae.architectures.topk import KSettings, chosen_features, with_auxk
from components.sae.coder import Coder, Exported, Losses, Progress
from components.sae.features import DenseFeatures, Features, SparseFeatures
from components.sae.kernels import rectified
from components.sae.kernels.selection import strongest_of_batch
from components.sae.kernels.sparse import goes_by_the_chosen
from components.sae.settings import CoderSettings

_SAME_LENGTH = 1e-5
"""Relative difference that rounding to float32 leaves between equal thresholds."""


class BatchTopKSettings(KSettings):
    decides = (*KSettings.decides, "threshold_decay")

    architecture: Literal["batchtopk"] = "batchtopk"
    """The strongest features of a whole batch, k per token on average (Bussmann et al. 2024)."""

    k: int = Field(default=32, ge=1)
    """Active features per token, on average over a batch."""

    threshold_decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the running mean of the weakest activation that was chosen: the part that is kept at each step. One of thousands in
    order hardly varies from batch to batch, and a long memory lags behind."""


class BatchTopKSAE(Coder):
    """Ranked by `f_i ||W_dec_i||`, over which the threshold stands too: one number for all features once they are folded."""

    parallel = True
    Settings: ClassVar[type[CoderSettings]] = BatchTopKSettings
    scaled_like_outputs = ("weakest",)
    by_feature_from = (0, 0)
    settings: BatchTopKSettings
    weakest: Tensor
    """Running mean of the smallest length that was chosen, `[]`; below zero before the first step."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self.register_buffer("weakest", torch.full((), -1.0))
        self._weakest: list[Tensor] = []
        """Of each batch since the last step."""

    def encode(self, x: Tensor) -> Features:
        x, norms = x.reshape(-1, self.d_in), self.row_norms()
        bound, bias = self.weakest.clamp_min(0.0) / norms.clamp_min(1e-20), self.read_bias(self.b_enc)
        if rectified.without_gradient(x, self.W_enc, bias - bound):
            values, indices, places = rectified.over_bound(x, self.W_enc, bias, bound)
            return SparseFeatures(values, indices, places.offsets, self.d_sae)
        before = self.pre_activations(x)
        lengths = torch.relu(before) * norms
        return DenseFeatures(torch.relu(before) * (lengths > self.weakest.clamp_min(0.0)))

    def _strongest(self, before: Tensor, k: int) -> SparseFeatures:
        """The `n k` strongest features of the batch."""
        with torch.no_grad():
            lengths = (torch.relu(before) * self.row_norms()).flatten()

            def strongest(count: int) -> Tensor:
                return lengths.topk(min(count * len(before), lengths.numel()), sorted=False).indices.sort().values

            if self.mesh is None:
                places = strongest(k)
                chosen = lengths[places]
                weakest = torch.where(chosen > 0, chosen, torch.inf).amin()
                weakest = torch.where(weakest.isfinite(), weakest, torch.zeros_like(weakest))
            else:

                def found(count: int) -> tuple[Tensor, Tensor, Tensor]:
                    places = strongest(count)
                    return places, places, lengths[places]

                places, _, weakest = self.mesh.strongest_of_batch(found, len(before), self.d_sae, k)
            self._weakest.append(weakest)
            starts = torch.arange(len(before) + 1, device=before.device) * self.d_sae
        values = torch.relu(before.flatten()[places])
        return SparseFeatures(values, places % self.d_sae, torch.searchsorted(places, starts), self.d_sae)

    def _chosen(self, x: Tensor, k: int) -> tuple[Tensor | None, SparseFeatures]:
        """Pre-activations of all features, where they are at hand, and the `n k` strongest of the batch."""
        if not goes_by_the_chosen(x, self.d_sae, self.mesh is None):
            before = self.pre_activations(x)
            return before, self._strongest(before, k)
        norms = self.row_norms().detach()
        if self.mesh is None:
            values, places, weakest = strongest_of_batch(x, self.W_enc, self.read_bias(self.b_enc), norms, k)
        else:

            def found(count: int) -> tuple[Tensor, Tensor, Tensor]:
                values, places, _ = strongest_of_batch(x, self.W_enc, self.read_bias(self.b_enc), norms, count)
                return values, places, torch.relu(values) * norms[places % self.d_sae]

            values, places, weakest = self.mesh.strongest_of_batch(found, len(x), self.d_sae, k)
        self._weakest.append(weakest)
        offsets = torch.searchsorted(places, torch.arange(len(x) + 1, device=x.device) * self.d_sae)
        return None, chosen_features(self, x, values, places % self.d_sae, offsets)

    def losses(self, x: Tensor, y: Tensor, progress: Progress) -> Losses:
        before, features = self._chosen(x, self.settings.k_at(progress))
        return with_auxk(self, self.settings, x, before, features, y, self.write(features, x), progress)

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._weakest:
            return
        found = self._weakest[0] if len(self._weakest) == 1 else torch.stack(self._weakest).mean()
        found, kept = found.to(self.weakest.dtype), self.settings.threshold_decay
        self.weakest.copy_(torch.where(self.weakest < 0, found, kept * self.weakest + (1 - kept) * found))
        self._weakest = []

    def exported(self) -> Exported:
        """As JumpReLU: `f_i > t / ||W_dec_i||`, where t is `weakest`."""
        tensors = dict(self.state_dict())
        threshold = tensors.pop("weakest").clamp_min(0.0)
        norm = self.row_norms().detach()
        tensors["threshold"] = threshold / torch.where(norm > 0, norm, torch.ones_like(norm))
        return Exported("jumprelu", tensors, {})

    def load_exported(self, tensors: Mapping[str, Tensor]) -> None:
        """The length over which features fire is `threshold_i ||W_dec_i||`, one for all: a JumpReLU whose features differ in it
        computes something else."""
        own = dict(tensors)
        lengths = own.pop("threshold").double() * self.row_norms(own["W_dec"].double())
        # Of a feature without a direction any threshold is as good.
        lengths = lengths[own["W_dec"].norm(dim=1) > 0]
        weakest = lengths.mean() if len(lengths) else lengths.new_zeros(())
        if len(lengths) and (lengths - weakest).abs().max() > _SAME_LENGTH * weakest:
            raise ValueError(f"its thresholds differ between features, and '{self.settings.architecture}' has one for all")
        super().load_exported({**own, "weakest": weakest})
