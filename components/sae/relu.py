"""The ReLU sparse autoencoder of *Scaling Monosemanticity* (Templeton et al. 2024, "Our SAE experiments")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class ReLUSAE(nn.Module):
    """`f(x) = ReLU(x W_enc + b_enc)`, `x_hat = f W_dec + b_dec`.

    W_enc `[d_in, d_sae]`, b_enc `[d_sae]`, W_dec `[d_sae, d_in]`, b_dec `[d_in]` (the layout of SAELens).
    """

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @torch.no_grad()
    def initialise(self, decoder_norm: float, seed: int) -> None:
        """Decoder rows of random direction and norm `decoder_norm`, the encoder their transpose, biases zero.

        Drawn on the CPU, so that every device starts from the same weights.
        """
        rows = torch.randn(self.d_sae, self.d_in, generator=torch.Generator().manual_seed(seed))
        self.W_dec.copy_(decoder_norm * rows / rows.norm(dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.zero_()

    def encode(self, x: Tensor) -> Tensor:
        """Activations `[..., d_in]` -> features `[..., d_sae]`."""
        return torch.relu(torch.nn.functional.linear(x, self.W_enc.T, self.b_enc))

    def decode(self, features: Tensor) -> Tensor:
        """Features `[..., d_sae]` -> reconstructions `[..., d_in]`."""
        return torch.nn.functional.linear(features, self.W_dec.T, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def folded(self, scale: float) -> ReLUSAE:
        """The same function on unscaled activations, for an SAE trained on `scale * x`, with unit decoder rows.

        The scale and the decoder norms go into the encoder: a feature's activation is then the length of what it adds
        to the reconstruction, which is what the paper reads (`f_i * ||W_dec_i||`). Computed in float64.
        """
        norm = self.W_dec.double().norm(dim=1)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        gain = norm / scale
        result = ReLUSAE(self.d_in, self.d_sae)
        result.W_enc.copy_(self.W_enc.double() * scale * gain)
        result.b_enc.copy_(self.b_enc.double() * gain)
        result.W_dec.copy_(self.W_dec.double() / norm[:, None])
        result.b_dec.copy_(self.b_dec.double() / scale)
        return result


@dataclass(frozen=True)
class LossTerms:
    """Means over the batch; `total = reconstruction + sparsity_coefficient * sparsity`."""

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    features: Tensor
    """Detached feature activations `[batch, d_sae]`."""


def relu_loss(sae: ReLUSAE, x: Tensor, sparsity_coefficient: float) -> LossTerms:
    """`E[ ||x - x_hat||^2 + lambda * sum_i f_i(x) * ||W_dec_i|| ]` (Templeton et al. 2024).

    x: `[batch, d_in]`, scaled so that the mean of `||x||^2` is `d_in`. The decoder norm is free: the penalty's gradient
    flows into it, which is what keeps the SAE from shrinking `f` and growing `W_dec`.
    """
    features = sae.encode(x)
    residual = x.float() - sae.decode(features).float()
    reconstruction = residual.square().sum(dim=1).mean()
    decoder_norms = sae.W_dec.norm(dim=1)
    # mean over tokens first: [batch, d_sae] -> [d_sae], then one dot product with the norms
    sparsity = features.float().mean(dim=0) @ decoder_norms
    return LossTerms(reconstruction + sparsity_coefficient * sparsity, reconstruction, sparsity, features.detach())
