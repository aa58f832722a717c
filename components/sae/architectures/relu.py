"""The ReLU sparse autoencoder of *Scaling Monosemanticity* (Templeton et al. 2024, "Our SAE experiments")."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from components.sae.coder import Coder, Exported, Losses, Progress, in_float32, reconstruction_loss
from components.sae.features import DenseFeatures
from components.sae.settings import CoderSettings


class ReLUSettings(CoderSettings):
    decides = (*CoderSettings.decides, "sparsity_coefficient", "sparsity_warmup")

    architecture: Literal["relu"] = "relu"
    """The ReLU encoder and the decoder-norm L1 penalty of Templeton et al. 2024."""

    sparsity_coefficient: float = Field(default=5.0, ge=0)
    """The paper's lambda: weight of `sum_i f_i ||W_dec_i||` against the squared error, at mean `||x||^2 = d_in`."""

    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of training over which lambda rises linearly from zero."""


class ReLUSAE(Coder):
    """`f(x) = ReLU(x W_enc + b_enc)`, `x_hat = f W_dec + b_dec`."""

    Settings = ReLUSettings
    settings: ReLUSettings

    def encode(self, x: Tensor) -> DenseFeatures:
        return DenseFeatures(torch.relu(self.pre_activations(x.reshape(-1, self.d_in))))

    def losses(self, x: Tensor, y: Tensor, progress: Progress) -> Losses:
        """`E[ ||y - y_hat||^2 + lambda * sum_i f_i(x) * ||W_dec_i|| ]` (Templeton et al. 2024).

        The decoder norm is free: the penalty's gradient flows into it, which is what keeps the coder from shrinking `f` and
        growing `W_dec`.
        """
        features = self.encode(x)
        reconstruction = reconstruction_loss(y, self.decode(features))
        with in_float32(x.device):
            # mean over tokens first: [n, d_sae] -> [d_sae], then one dot product with the norms
            sparsity = features.means() @ self.W_dec.norm(dim=1)
        coefficient = self.settings.sparsity_coefficient * progress.rise(self.settings.sparsity_warmup)
        return Losses(
            {"reconstruction": reconstruction, "sparsity": sparsity},
            {"reconstruction": 1.0, "sparsity": coefficient},
            features.detach(),
        )

    def exported(self) -> Exported:
        return Exported("standard", dict(self.state_dict()), {})
