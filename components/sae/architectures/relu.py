"""The ReLU sparse autoencoder of *Scaling Monosemanticity* (Templeton et al. 2024, "Our SAE experiments")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from components.sae.auxiliary import auxk_loss_of
from components.sae.coder import Coder, Exported, Losses, Progress, in_float32, reconstruction_loss
from components.sae.features import DenseFeatures, Features, SparseFeatures
from components.sae.kernels import rectified
from components.sae.kernels.sizes import LARGE
from components.sae.settings import CoderSettings

_PROPORTIONAL, _INTEGRAL_STEPS = 2.0, 25
"""How the logarithm of lambda answers that of L0 / target: at once, and by its sum. The L0 lags about a hundred steps behind
lambda and falls as its power -0.3 (late) to -1 (early); both come to a damping of about 0.75."""


class ReLUSettings(CoderSettings):
    decides = (*CoderSettings.decides, "sparsity_coefficient", "sparsity_warmup")
    decides_later = (*CoderSettings.decides_later, "auxk_coefficient", "auxk", "target_l0")

    architecture: Literal["relu"] = "relu"
    """The ReLU encoder and the decoder-norm L1 penalty of Templeton et al. 2024."""

    sparsity_coefficient: float = Field(default=5.0, ge=0)
    """The paper's lambda: weight of `sum_i f_i ||W_dec_i||` against the squared error, at mean `||x||^2 = d_in`."""

    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of training over which lambda rises linearly from zero."""

    target_l0: float | None = Field(default=None, gt=0)
    """Active features per token to arrive at, whatever the model: lambda then begins at `sparsity_coefficient` and grows while
    more are active, and shrinks while fewer are. Where it is not given, lambda stands, and which one is right depends on the
    model and the layer."""

    auxk_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the loss by which dead features come back (AuxK), in units of the residual's variance. The paper has none: a
    rectifier that is never over zero has no gradient."""

    auxk: int | None = Field(default=None, ge=1)
    """Dead features per token that take part in it; half of the width of what is written where it is not given."""

    @model_validator(mode="after")
    def _lambda_can_grow(self) -> Self:
        if self.target_l0 is not None and self.sparsity_coefficient == 0:
            raise ValueError("sae.sparsity_coefficient is 0, which does not grow; give another, or leave sae.target_l0 out")
        return self


class ReLUSAE(Coder):
    """`f(x) = ReLU(x W_enc + b_enc)`, `x_hat = f W_dec + b_dec`."""

    parallel = True
    Settings = ReLUSettings
    settings: ReLUSettings
    by_feature_from = LARGE
    growth: Tensor | None
    """Natural logarithm of what lambda is multiplied by in the long run, `[]`, where it aims at an L0."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register_buffer("growth", None if self.settings.target_l0 is None else torch.zeros(()))
        self._excess: Tensor | None = None

    def encode(self, x: Tensor) -> Features:
        x, bias = x.reshape(-1, self.d_in), self.read_bias(self.b_enc)
        if rectified.without_gradient(x, self.W_enc, bias):
            values, indices, places = rectified.over_bound(x, self.W_enc, bias)
            return SparseFeatures(values, indices, places.offsets, self.d_sae)
        return DenseFeatures(torch.relu(self.pre_activations(x)))

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
        # At the start half of all features fire, which no lambda is to blame for.
        if (
            self.growth is not None
            and self.settings.target_l0 is not None
            and progress.rise(2 * self.settings.sparsity_warmup) == 1
        ):
            active = self.over_tokens(self.over_features(features.detach().active().float().mean())).detach()
            self._excess = (active / self.settings.target_l0).log().clamp(-1.0, 1.0)
            coefficient *= float((self.growth + _PROPORTIONAL * self._excess).exp())
        terms = {"reconstruction": reconstruction_loss(y, y_hat), "sparsity": sparsity}
        weights = {"reconstruction": 1.0, "sparsity": coefficient}
        if self.settings.auxk_coefficient > 0 and progress.dead is not None:
            k = self.settings.auxk or max(1, self.d_out // 2)
            terms["auxk"] = auxk_loss_of(self, x, before, progress.dead, y - y_hat, k, progress.dead_count)
            weights["auxk"] = self.settings.auxk_coefficient
        return Losses(terms, weights, features.detach())

    @torch.no_grad()
    def after_step(self) -> None:
        if self.growth is not None and self._excess is not None:
            self.growth += self._excess / _INTEGRAL_STEPS
            self._excess = None

    def exported(self) -> Exported:
        return Exported("standard", {name: value for name, value in self.state_dict().items() if name != "growth"}, {})

    def load_exported(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_exported(dict(tensors) if self.growth is None else {**tensors, "growth": torch.zeros_like(self.growth)})
