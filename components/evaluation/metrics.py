"""Metrics as sums: float64 over all counted tokens first, ratios last, so that no metric depends on the batch size.

All of them count the same tokens: the caller selects the rows once, for every quantity.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE_LOSS_GAP = 1e-3
"""Nats. Under it the language model does not need the hook point, and a ratio against it would be noise."""


class ReconstructionSums:
    """How well `x_hat` stands for `x`, and with how many features."""

    def __init__(self, d_in: int, d_sae: int, shift: Tensor) -> None:
        """shift: any vector `[d_in]` near the mean; it only keeps the variance's sum from cancelling."""
        device = shift.device
        self.d_in = d_in
        self.shift = shift.double()
        self.tokens = 0
        self.squared_error = 0.0
        self.squared_norm = 0.0
        self.cosine = 0.0
        self.norm_ratio = 0.0
        self.active = 0
        self._shifted = torch.zeros(d_in, dtype=torch.float64, device=device)
        self._shifted_squares = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """Per feature `[d_sae]`: tokens on which it fired."""
        self.activation = torch.zeros(d_sae, dtype=torch.float64, device=device)
        """Per feature `[d_sae]`: sum of its activations."""
        self.largest = torch.zeros(d_sae, dtype=torch.float32, device=device)
        """Per feature `[d_sae]`: its largest activation."""

    def add(self, x: Tensor, x_hat: Tensor, features: Tensor) -> None:
        """x, x_hat: `[n, d_in]`; features: `[n, d_sae]`. Counted tokens only."""
        if len(x) == 0:
            return
        x, x_hat = x.double(), x_hat.double()
        squares, squares_hat = x.square().sum(dim=1), x_hat.square().sum(dim=1)
        self.tokens += len(x)
        self.squared_error += (x - x_hat).square().sum().item()
        self.squared_norm += squares.sum().item()
        norms = (squares * squares_hat).sqrt()
        self.cosine += torch.where(norms > 0, (x * x_hat).sum(dim=1) / norms, 0.0).sum().item()
        self.norm_ratio += torch.where(squares > 0, (squares_hat / squares).sqrt(), 0.0).sum().item()
        shifted = x - self.shift
        self._shifted += shifted.sum(dim=0)
        self._shifted_squares += shifted.square().sum().item()
        firing = features > 0
        self.active += int(firing.sum().item())
        self.fired += firing.sum(dim=0)
        self.activation += features.sum(dim=0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, features.float().amax(dim=0))

    def metrics(self) -> dict[str, float | None]:
        assert self.tokens > 0, "no token was counted"
        # sum ||x - m||^2 for the mean m of the set itself, from sums around the shift
        variance = self._shifted_squares - (self._shifted / self.tokens).square().sum().item() * self.tokens
        return {
            "mse": self.squared_error / self.tokens / self.d_in,
            "normalized_mse": self.squared_error / variance if variance > 0 else None,
            "explained_variance": 1.0 - self.squared_error / variance if variance > 0 else None,
            "l0": self.active / self.tokens,
            "dead_fraction": (self.fired == 0).double().mean().item(),
            "cosine_similarity": self.cosine / self.tokens,
            "norm_ratio": self.norm_ratio / self.tokens,
        }


class LossSums:
    """What the language model loses when the hook point is replaced: next-token cross-entropy and KL divergence."""

    VARIANTS = ("sae", "zero", "mean")

    def __init__(self) -> None:
        self.positions = 0
        self.cross_entropy = dict.fromkeys(("clean", *self.VARIANTS), 0.0)
        self.kl = 0.0

    def add(self, clean: Tensor, replaced: dict[str, Tensor], targets: Tensor, counted: Tensor) -> None:
        """One sequence. clean, replaced[variant]: logits `[length, vocabulary]` that predict targets `[length]`;
        counted `[length]`: positions that are counted, the same for every variant."""
        targets = targets[counted]
        self.positions += len(targets)
        log_p = torch.log_softmax(clean[counted].float(), dim=-1)
        self.cross_entropy["clean"] += _cross_entropy(log_p, targets)
        for variant in self.VARIANTS:
            log_q = torch.log_softmax(replaced[variant][counted].float(), dim=-1)
            self.cross_entropy[variant] += _cross_entropy(log_q, targets)
            if variant == "sae":
                self.kl += (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum().item()

    def metrics(self) -> dict[str, float | None]:
        assert self.positions > 0, "no position was counted"
        losses = {name: total / self.positions for name, total in self.cross_entropy.items()}
        return {
            **{f"ce_loss_{name}": loss for name, loss in losses.items()},
            "loss_recovered": _recovered(losses["zero"], losses["sae"], losses["clean"]),
            "loss_recovered_mean": _recovered(losses["mean"], losses["sae"], losses["clean"]),
            "kl_divergence": self.kl / self.positions,
        }


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> float:
    """Sum over positions, in nats."""
    return -log_probabilities.gather(1, targets[:, None]).double().sum().item()


def _recovered(baseline: float, spliced: float, clean: float) -> float | None:
    """`(baseline - spliced) / (baseline - clean)`, None where the baseline costs nothing."""
    gap = baseline - clean
    return (baseline - spliced) / gap if abs(gap) >= NEGLIGIBLE_LOSS_GAP else None
