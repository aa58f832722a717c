"""Metrics as sums: float64 over the counted tokens first, ratios last, so that no metric depends on the batch size.

Sums are kept per group (a document, a range of positions, a class of tokens), one row each, over the same tokens for every
quantity. A metric is a function of one such row, or of any weighted sum of rows: that is what the bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEGLIGIBLE_LOSS_GAP = 1e-3
"""Nats. Under it the language model does not need the hook point, and a ratio against it would be noise."""

SHARED = ("tokens", "positions", "variance", "ce_clean")
"""Per token: 1; 1 where the next token is predicted; `||x - shift||^2`; cross-entropy in nats."""
PER_VARIANT = ("squared_error", "active", "cosine", "norm_ratio", "ce", "kl")
"""Per token and variant: `||x - x_hat||^2`, features that fire, `cos(x, x_hat)`, `||x_hat|| / ||x||`, cross-entropy, KL."""


def column_names(variants: Sequence[str]) -> tuple[str, ...]:
    return (*SHARED, *(f"{variant}.{name}" for variant in variants for name in PER_VARIANT))


class Sums(NamedTuple):
    """A row of sums per group, in float64."""

    table: np.ndarray
    """`[groups, columns]`, see `column_names`."""
    shifted: np.ndarray
    """`[groups, d_in]`, of `x - shift`."""


class GroupedSums:
    """Sums of every column per group, `[groups, columns]`, and of `x - shift`, `[groups, d_in]`, in float64."""

    def __init__(self, groups: int, columns: int, d_in: int, device: torch.device) -> None:
        self.table = torch.zeros(groups, columns, dtype=torch.float64, device=device)
        self.shifted = torch.zeros(groups, d_in, dtype=torch.float64, device=device)

    def add(self, group: Tensor, values: Tensor, shifted: Tensor) -> None:
        """group `[n]`, values `[n, columns]`, shifted `[n, d_in]`: one row per token."""
        self.table.index_add_(0, group, values)
        self.shifted.index_add_(0, group, shifted)

    def rows(self, groups: int | None = None) -> Sums:
        """Those of the first `groups` groups, or of all."""
        return Sums(self.table[:groups].cpu().numpy(), self.shifted[:groups].cpu().numpy())


def reconstruction_columns(x: Tensor, x_hat: Tensor, active: Tensor) -> list[Tensor]:
    """The first four of `PER_VARIANT`, each `[n]`. x, x_hat: `[n, d_in]` in float64; active: `[n]`."""
    squares, squares_hat = x.square().sum(dim=1), x_hat.square().sum(dim=1)
    norms = (squares * squares_hat).sqrt()
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return [
        (x - x_hat).square().sum(dim=1),
        active.double(),
        torch.where(norms > 0, (x * x_hat).sum(dim=1) / norms, zero),
        torch.where(squares > 0, (squares_hat / squares).sqrt(), zero),
    ]


def token_losses(clean: Tensor, others: Tensor, targets: Tensor, with_kl: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy as it is `[n]`, that of each variant and its KL(clean || variant), both `[variants, n]`, in nats.

    clean `[n, vocabulary]` and others `[variants, n, vocabulary]` are logits that predict targets `[n]`. KL is left at
    zero for a variant that is not in `with_kl`.
    """
    wide = torch.promote_types(clean.dtype, torch.float32)
    log_p = torch.log_softmax(clean, dim=-1, dtype=wide)
    p = log_p.exp() if any(with_kl) else log_p
    losses, divergences = [], []
    for logits, divergence in zip(others, with_kl, strict=True):
        log_q = torch.log_softmax(logits, dim=-1, dtype=wide)
        losses.append(_cross_entropy(log_q, targets))
        # In place, log_q becomes log p - log q: memory traffic is what this costs beside the exponentials.
        mean_gap = torch.linalg.vecdot(p, log_q.neg_().add_(log_p)) if divergence else torch.zeros_like(losses[-1])
        divergences.append(mean_gap)
    return _cross_entropy(log_p, targets), torch.stack(losses), torch.stack(divergences)


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(1, targets[:, None])[:, 0]


class Totals:
    """Metrics of rows of sums: each is `[...]` for a table `[..., columns]` and shifted sums `[..., d_in]`.

    A metric that is not defined is NaN: a ratio over nothing, or against a loss gap under `NEGLIGIBLE_LOSS_GAP`.
    """

    def __init__(
        self, table: np.ndarray, shifted: np.ndarray, variants: Sequence[str], centre: np.ndarray | None = None
    ) -> None:
        """centre `[d_in]`: the mean, less the shift, that the variance is taken around; that of the rows where not given."""
        self._columns = {name: table[..., number] for number, name in enumerate(column_names(variants))}
        self.d_in = shifted.shape[-1]
        self.tokens, self.positions = self._columns["tokens"], self._columns["positions"]
        # sum ||x - m||^2 from sums around the shift s: sum ||x - s||^2 - 2 (m - s) sum (x - s) + n ||m - s||^2
        if centre is None:
            with np.errstate(invalid="ignore", divide="ignore"):
                spread = np.square(shifted).sum(axis=-1) / self.tokens
            self.variance = self._columns["variance"] - spread
        else:
            around = self.tokens * np.square(centre).sum() - 2 * (shifted @ centre)
            self.variance = self._columns["variance"] + around

    def of(self, variant: str) -> dict[str, np.ndarray]:
        """The metrics of one variant, by the names of the table in docs/results.md."""
        per = {name: self._columns[f"{variant}.{name}"] for name in PER_VARIANT}
        error = per["squared_error"]
        return {
            "mse": _ratio(error, self.tokens) / self.d_in,
            "normalized_mse": _ratio(error, self.variance),
            "explained_variance": 1.0 - _ratio(error, self.variance),
            "l0": _ratio(per["active"], self.tokens),
            "cosine_similarity": _ratio(per["cosine"], self.tokens),
            "norm_ratio": _ratio(per["norm_ratio"], self.tokens),
            "ce_loss": _ratio(per["ce"], self.positions),
            "kl_divergence": _ratio(per["kl"], self.positions),
        }

    def ce_loss(self, variant: str) -> np.ndarray:
        name = "ce_clean" if variant == "clean" else f"{variant}.ce"
        return _ratio(self._columns[name], self.positions)

    def loss_recovered(self, variant: str, baseline: str = "zero") -> np.ndarray:
        """`(baseline - variant) / (baseline - clean)`, of means and never a mean of ratios."""
        gap = self.ce_loss(baseline) - self.ce_loss("clean")
        # Not against rounding: under the limit, what is left of the loss gap says nothing about the SAE.
        gap = np.where(np.abs(gap) >= NEGLIGIBLE_LOSS_GAP, gap, np.nan)
        return (self.ce_loss(baseline) - self.ce_loss(variant)) / gap

    def summary(self) -> dict[str, np.ndarray]:
        """The metrics of the variant `sae` against `zero` and `mean`."""
        return {
            **{name: value for name, value in self.of("sae").items() if name != "ce_loss"},
            **{f"ce_loss_{variant}": self.ce_loss(variant) for variant in ("clean", "sae", "zero", "mean")},
            "loss_recovered": self.loss_recovered("sae"),
            "loss_recovered_mean": self.loss_recovered("sae", "mean"),
        }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def number(value: float | np.ndarray) -> float | None:
    """A plain number, None for what is not defined."""
    return float(value) if np.isfinite(value) else None
