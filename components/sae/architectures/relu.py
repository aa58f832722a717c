"""The ReLU sparse autoencoder of *Scaling Monosemanticity* (Templeton et al. 2024, "Our SAE experiments")."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from components.sae.auxiliary import auxk_loss_of
from components.sae.coder import Coder, Exported, Losses, Progress, in_float32, reconstruction_loss
from components.sae.features import DenseFeatures, SparseFeatures
from components.sae.kernels import rectified
from components.sae.settings import CoderSettings


class ReLUSettings(CoderSettings):
    decides = (*CoderSettings.decides, "sparsity_coefficient", "sparsity_warmup")
    decides_later = (*CoderSettings.decides_later, "auxk_coefficient", "auxk")

    architecture: Literal["relu"] = "relu"
    """The ReLU encoder and the decoder-norm L1 penalty of Templeton et al. 2024."""

    sparsity_coefficient: float = Field(default=5.0, ge=0)
    """The paper's lambda: weight of `sum_i f_i ||W_dec_i||` against the squared error, at mean `||x||^2 = d_in`."""

    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of training over which lambda rises linearly from zero."""

    auxk_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the loss by which dead features come back (AuxK), in units of the residual's variance. The paper has none: a
    rectifier that is never over zero has no gradient."""

    auxk: int | None = Field(default=None, ge=1)
    """Dead features per token that take part in it; half of the width of what is written where it is not given."""


class ReLUSAE(Coder):
    """`f(x) = ReLU(x W_enc + b_enc)`, `x_hat = f W_dec + b_dec`."""

    parallel = True
    Settings = ReLUSettings
    settings: ReLUSettings
    by_feature_from = rectified.LARGE

    def encode(self, x: Tensor) -> DenseFeatures:
        return DenseFeatures(torch.relu(self.pre_activations(x.reshape(-1, self.d_in))))

    def losses(self, x: Tensor, y: Tensor, progress: Progress) -> Losses:
        """`E[ ||y - y_hat||^2 + lambda * sum_i f_i(x) * ||W_dec_i|| ]` (Templeton et al. 2024).

        The decoder norm is free: the penalty's gradient flows into it, which is what keeps the coder from shrinking `f` and
        growing `W_dec`.
        """
        before: Tensor | None = None
        features: DenseFeatures | SparseFeatures
        bias = self.read_bias(self.b_enc)
        if self.mesh is None and rectified.is_sparse(x, self.W_enc, bias):
            values, indices, places = rectified.over_bound(x, self.W_enc, bias)
            features = SparseFeatures(values, indices, places.offsets, self.d_sae, places)
        else:
            before = self.pre_activations(x)
            features = DenseFeatures(torch.relu(before))
        y_hat = self.write(features, x)
        with in_float32(x.device):
            # mean over tokens first: [n, d_sae] -> [d_sae], then one dot product with the norms
            sparsity = self.over_features(features.means() @ self.row_norms())
        coefficient = self.settings.sparsity_coefficient * progress.rise(self.settings.sparsity_warmup)
        terms = {"reconstruction": reconstruction_loss(y, y_hat), "sparsity": sparsity}
        weights = {"reconstruction": 1.0, "sparsity": coefficient}
        if self.settings.auxk_coefficient > 0 and progress.dead is not None:
            k = self.settings.auxk or max(1, self.d_out // 2)
            terms["auxk"] = auxk_loss_of(self, x, before, progress.dead, y - y_hat, k)
            weights["auxk"] = self.settings.auxk_coefficient
        return Losses(terms, weights, features.detach())

    def exported(self) -> Exported:
        return Exported("standard", dict(self.state_dict()), {})
