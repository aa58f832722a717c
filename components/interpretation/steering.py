"""Steering: a feature held at a value while the language model writes (paper, "Influence on Behavior")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from components.evaluation.measurements import Autoencoder
from components.language_model.hook_points import HookPoint, capture, hooked, spliced_logits, within
from components.settings import UserError

Replace = Callable[[Tensor, Tensor], Tensor | None]
"""What a coder reads `[batch, length, d_in]` and what it writes to `[batch, length, d_out]` -> another in place of the second,
or None to leave it."""


def clamped(sae: Autoencoder, feature: int, value: float, longest: float | None = None) -> Replace:
    """The feature at `value` on every token. What the coder does not reconstruct stays (the paper's error term): only
    `(value - f) W_dec` is added. longest: tokens of a larger norm are left alone: on an attention sink, which it was not
    trained on, f means nothing and may be thousands."""
    row: Tensor = sae.W_dec[feature]  # type: ignore[attr-defined]

    def replace(x: Tensor, y: Tensor) -> Tensor:
        features, _ = sae.reconstruct(x.reshape(-1, x.shape[-1]).to(row.dtype))
        change = (value - features.dense()[:, feature]).reshape(*y.shape[:-1], 1)
        if longest is not None:
            change = change * (x.norm(dim=-1, keepdim=True) <= longest)
        return (y.to(row.dtype) + change * row).to(y.dtype)

    return replace


@torch.no_grad()
def continued(
    model: nn.Module, point: HookPoint, replace: Replace, ids: Sequence[int], count: int, device: torch.device,
    reads: Sequence[HookPoint] = (),
) -> list[int]:  # fmt: skip
    """The `count` most likely next tokens, one after the other, with the activation at `point` passed through `replace` at all
    of them. reads: what the coder reads where that is not `point`; the model must come by there first. Of two models the one
    that `point` is in is steered, and writes."""
    tokens = list(ids)
    beside = [one for one in reads if within(model, one)[0] is not within(model, point)[0]]
    for _ in range(count):
        read = capture(model, beside, {"input_ids": torch.tensor([tokens], device=device)}) if beside else {}

        def here(y: Tensor, read: dict[HookPoint, Tensor] = read) -> Tensor | None:
            missing = [str(one) for one in reads if one not in read and one != point]
            if missing:
                raise UserError(f"sae: it reads {', '.join(missing)}, which comes after '{point}', and cannot steer there")
            return replace(torch.cat([read.get(one, y) for one in reads], dim=-1) if reads else y, y)

        with ExitStack() as hooks:
            for one in reads:
                if one != point and one not in beside:
                    hooks.enter_context(hooked(model, one, partial(_keep, read, one), 1))
            logits = spliced_logits(model, point, here, torch.tensor([tokens], device=device))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(ids) :]


def _keep(read: dict[HookPoint, Tensor], point: HookPoint, activation: Tensor) -> None:
    read[point] = activation.clone()
