"""Steering: a feature held at a value while the language model writes (paper, "Influence on Behavior")."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from components.evaluation.measurements import Autoencoder
from components.language_model.hook_points import HookPoint, spliced_logits


def clamped(sae: Autoencoder, feature: int, value: float) -> Callable[[Tensor], Tensor]:
    """Activations `[batch, length, d_in]` -> the same with the feature at `value` on every token. What the coder does not
    reconstruct stays (the paper's error term): only `(value - f) W_dec` is added."""
    row: Tensor = sae.W_dec[feature]  # type: ignore[attr-defined]

    def replace(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(row.dtype)
        features, _ = sae.reconstruct(flat)
        change = value - features.dense()[:, feature]
        return (flat + change[:, None] * row).reshape(x.shape).to(x.dtype)

    return replace


@torch.no_grad()
def continued(
    model: nn.Module, point: HookPoint, replace: Callable[[Tensor], Tensor | None], ids: Sequence[int], count: int,
    device: torch.device,
) -> list[int]:  # fmt: skip
    """The `count` most likely next tokens, one after the other, with the activation passed through `replace` at all of them."""
    tokens = list(ids)
    for _ in range(count):
        logits = spliced_logits(model, point, replace, torch.tensor([tokens], device=device))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(ids) :]
