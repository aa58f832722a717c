"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435), trained as Anthropic published in January 2025 ("Circuits Updates"),
or towards a wanted L0."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.sae.coder import Coder, Exported, Losses, Progress, in_float32, reconstruction_loss
from components.sae.features import DenseFeatures, Features, SparseFeatures
from components.sae.kernels import rectified
from components.sae.kernels.sizes import LARGE
from components.sae.settings import CoderSettings, FromTokens


class JumpReLUSettings(FromTokens):
    version = 2  # of 1, decoder rows began random and a third as long, the bias at zero, and up to 38% of the features died

    decides = (
        *CoderSettings.decides, "sparsity", "sparsity_coefficient", "sparsity_warmup", "target_l0", "tanh_scale",
        "pre_activation_coefficient", "bandwidth", "threshold_init",
    )  # fmt: skip
    decides_later = (*CoderSettings.decides_later, "frequency_coefficient", "frequency_scale")

    architecture: Literal["jumprelu"] = "jumprelu"
    """A learned threshold for each feature (Rajamanoharan et al. 2024)."""

    sparsity: Literal["tanh", "target_l0", "l0"] = "tanh"
    """`tanh`: `lambda sum_i tanh(c f_i ||W_dec_i||)` (Anthropic, January 2025). `target_l0`: `lambda (L0 / target - 1)^2`.
    `l0`: `lambda L0` (Rajamanoharan et al. 2024)."""

    sparsity_coefficient: float = Field(default=1.0, ge=0)
    """Lambda, which rises linearly from zero over `sparsity_warmup`."""

    sparsity_warmup: float = Field(default=1.0, ge=0, le=1)
    """Share of training over which lambda rises."""

    target_l0: float = Field(default=32.0, gt=0)
    """Active features per token that `target_l0` aims at."""

    tanh_scale: float = Field(default=4.0, gt=0)
    """c of `tanh`."""

    frequency_coefficient: float = Field(default=0.0, ge=0)
    """Weight of `sum_i p_i^2 / frequency_scale`, p_i the share of tokens on which a feature fires: it keeps them from firing
    nearly everywhere. With `l0` and lambda for both it is the quadratic frequency penalty of Smith et al. 2025 ("Negative
    results for SAEs on downstream tasks", appendix); with `target_l0` what Gemma Scope 2 describes."""

    frequency_scale: float = Field(default=0.1, gt=0, le=1)
    """The share of tokens from which on that penalty outweighs one that is linear in it."""

    pre_activation_coefficient: float = Field(default=3e-6, ge=0)
    """Weight of `sum_i relu(theta_i - z_i) ||W_dec_i||`, by which features that never fire come back."""

    bandwidth: float = Field(default=2.0, gt=0)
    """Width of the window around the threshold in which the jump has a gradient, at mean `||x||^2 = d_in`."""

    threshold_init: float = Field(default=0.1, gt=0)
    """Threshold of every feature at the start."""


class JumpReLUSAE(Coder):
    """`z = x W_enc + b_enc`, `f = z` where `z > theta` and `theta`'s feature is positive, else 0."""

    parallel = True
    Settings = JumpReLUSettings
    settings: JumpReLUSettings
    by_feature_from = LARGE
    scaled_like_features = ("b_enc", "threshold")

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # In float32 and straight: as a logarithm under Adam, or in bfloat16, it hardly moves.
        self.threshold = torch.nn.Parameter(torch.zeros(self.d_sae))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        super().initialise(seed)
        self.threshold.fill_(self.settings.threshold_init)

    def onset(self) -> Tensor:
        return self.threshold.detach()

    def encode(self, x: Tensor) -> Features:
        bound, bias = self.threshold.clamp_min(0.0), self.read_bias(self.b_enc)
        if rectified.without_gradient(x := x.reshape(-1, self.d_in), self.W_enc, bias - bound):
            values, indices, places = rectified.over_bound(x, self.W_enc, bias, bound)
            return SparseFeatures(values, indices, places.offsets, self.d_sae)
        z = self.pre_activations(x.reshape(-1, self.d_in))
        return DenseFeatures(torch.relu(z) * (z > self.threshold))

    def losses(self, x: Tensor, y: Tensor, progress: Progress) -> Losses:
        settings = self.settings
        # Further below its threshold a feature has no gradient but that of its silence.
        lowest = self.threshold.detach() - settings.bandwidth / 2
        sparse = self.mesh is None and rectified.is_sparse(x, self.W_enc, self.read_bias(self.b_enc) - lowest)
        features, penalties = self._among_few(x, lowest) if sparse else self._among_all(x)
        reconstruction = reconstruction_loss(y, self.write(features, x))
        coefficient = settings.sparsity_coefficient * progress.rise(settings.sparsity_warmup)
        terms = {"reconstruction": reconstruction, **penalties}
        weights = {"reconstruction": 1.0, "sparsity": coefficient, "pre_activation": settings.pre_activation_coefficient}
        if settings.frequency_coefficient > 0:
            weights["frequency"] = settings.frequency_coefficient * progress.rise(settings.sparsity_warmup)
        return Losses(terms, weights, features.detach())

    def _among_all(self, x: Tensor) -> tuple[Features, dict[str, Tensor]]:
        """Features and penalties from the pre-activations of all features."""
        settings, z = self.settings, self.pre_activations(x).float()
        with in_float32(x.device):
            jump: Tensor = _Jump.apply(z, self.threshold, settings.bandwidth)
            values = torch.relu(z) * jump
            norms = self.row_norms()
            if settings.sparsity == "tanh":
                sparsity = self.over_features(torch.tanh(settings.tanh_scale * values * norms).sum(dim=1).mean())
            elif settings.sparsity == "l0":
                sparsity = self.over_features(jump.sum(dim=1).mean())
            else:
                found = self.over_tokens(self.over_features(jump.sum(dim=1).mean()))
                sparsity = (found / settings.target_l0 - 1).square()
            silent = self.over_features(torch.relu(self.threshold - z).mean(dim=0) @ norms)
            penalties = {"sparsity": sparsity, "pre_activation": silent}
            if settings.frequency_coefficient > 0:
                share = self.over_tokens(jump.mean(dim=0))
                penalties["frequency"] = self.over_features(share.square().sum()) / settings.frequency_scale
        return DenseFeatures(values), penalties

    def _among_few(self, x: Tensor, lowest: Tensor) -> tuple[Features, dict[str, Tensor]]:
        """The same from those over `lowest` `[d_sae]` alone. The silence of the others is linear in x: its mean does."""
        settings, n = self.settings, len(x)
        bias = self.read_bias(self.b_enc)
        z, indices, places = rectified.over_bound(x, self.W_enc, bias, lowest)
        threshold, norms = self.threshold[indices], self.row_norms()
        jump: Tensor = _Jump.apply(z, threshold, settings.bandwidth)
        values = torch.relu(z) * jump
        if settings.sparsity == "tanh":
            sparsity = torch.tanh(settings.tanh_scale * values * norms[indices]).sum() / n
        elif settings.sparsity == "l0":
            sparsity = jump.sum() / n
        else:
            sparsity = (jump.sum() / n / settings.target_l0 - 1).square()
        over = torch.zeros_like(norms).index_add(0, indices, torch.relu(z - threshold)) / n
        below = self.threshold - bias - x.mean(dim=0) @ self.W_enc
        penalties = {"sparsity": sparsity, "pre_activation": (below + over) @ norms}
        if settings.frequency_coefficient > 0:
            shares = torch.zeros_like(norms).index_add(0, indices, jump) / n
            penalties["frequency"] = shares.square().sum() / settings.frequency_scale
        return SparseFeatures(values, indices, places.offsets, self.d_sae, places), penalties

    @torch.no_grad()
    def after_step(self) -> None:
        self.threshold.clamp_(min=0.0)

    def exported(self) -> Exported:
        return Exported("jumprelu", dict(self.state_dict()), {})


class _Jump(torch.autograd.Function):
    """`H(z - theta)`, whose gradient is that of a ramp of width `bandwidth` around the threshold: `1 / bandwidth` in it for z,
    and its negative for theta (Rajamanoharan et al. 2024, section 3)."""

    @staticmethod
    def forward(context: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        context.save_for_backward(z, threshold)
        context.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = context.saved_tensors
        inside = ((z - threshold).abs() < context.bandwidth / 2).to(z.dtype) / context.bandwidth
        flow = gradient * inside
        return flow, -flow if threshold.shape == flow.shape else -flow.sum(dim=0), None
