"""Gated (Rajamanoharan et al. 2024, arXiv 2404.16014): one path decides whether a feature fires, the other how strongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.sae.coder import Coder, Exported, Losses, Progress, in_float32, reconstruction_loss
from components.sae.features import DenseFeatures
from components.sae.settings import CoderSettings


class GatedSettings(CoderSettings):
    decides = (*CoderSettings.decides, "sparsity_coefficient", "sparsity_warmup")

    version = 2  # of 1, the penalty shrank the decoder

    architecture: Literal["gated"] = "gated"
    """Gate and magnitude on one encoder (Rajamanoharan et al. 2024)."""

    sparsity_coefficient: float = Field(default=5.0, ge=0)
    """Weight of `sum_i relu(gate_i) ||W_dec_i||` against the squared error, at mean `||x||^2 = d_in`."""

    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of training over which it rises linearly from zero."""


class GatedSAE(Coder):
    """`p = x W_enc`; `f_i = relu(p_i exp(r_i) + b_mag_i)` where `p_i + b_gate_i > 0`, else 0."""

    parallel = True
    Settings = GatedSettings
    settings: GatedSettings
    scaled_like_features = ("b_gate", "b_mag")
    encoder_biases = ("b_gate", "b_mag")
    b_gate: torch.nn.Parameter
    b_mag: torch.nn.Parameter
    r_mag: torch.nn.Parameter

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        del self.b_enc
        for name in ("b_gate", "b_mag", "r_mag"):
            setattr(self, name, torch.nn.Parameter(torch.zeros(self.d_sae)))

    def pre_activations(self, x: Tensor) -> Tensor:
        """`x W_enc`, which both paths read."""
        return torch.nn.functional.linear(x, self.W_enc.T, self.read_bias(torch.zeros_like(self.b_gate)))

    def moved_biases(self, tensors: Mapping[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
        return {"b_gate": tensors["b_gate"] + shift, "b_mag": tensors["b_mag"] + shift * tensors["r_mag"].exp()}

    def _features(self, product: Tensor) -> DenseFeatures:
        return DenseFeatures((product + self.b_gate > 0) * torch.relu(product * self.r_mag.exp() + self.b_mag))

    def encode(self, x: Tensor) -> DenseFeatures:
        return self._features(self.pre_activations(x.reshape(-1, self.d_in)))

    def losses(self, x: Tensor, y: Tensor, progress: Progress) -> Losses:
        """`E[ ||y - y_hat||^2 + lambda sum_i relu(gate_i) ||W_dec_i|| + ||y - y_hat(relu(gate))||^2 ]`, the last with the
        decoder held still (section 3.2): it is what teaches the gate.

        The penalty does not pull at the decoder norm either. It would shrink it without end: the magnitudes make up for it,
        and the gate's own reconstruction, which could not, stands still.
        """
        product = self.pre_activations(x)
        features = self._features(product)
        opened = DenseFeatures(torch.relu(product + self.b_gate))
        reconstruction = reconstruction_loss(y, self.write(features, x))
        by_gate = self.written(opened, self.W_dec.detach(), self.b_dec.detach())
        auxiliary = reconstruction_loss(y, self.skipped(by_gate, x, held=True))
        with in_float32(x.device):
            sparsity = self.over_features(opened.means() @ self.row_norms().detach())
        coefficient = self.settings.sparsity_coefficient * progress.rise(self.settings.sparsity_warmup)
        return Losses(
            {"reconstruction": reconstruction, "sparsity": sparsity, "gate": auxiliary},
            {"reconstruction": 1.0, "sparsity": coefficient, "gate": 1.0},
            features.detach(),
        )

    def exported(self) -> Exported:
        return Exported("gated", dict(self.state_dict()), {})
