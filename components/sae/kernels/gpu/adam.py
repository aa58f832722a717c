"""Adam in one pass over memory: clipping, moments, weights, and what of the weights the next step reads in bfloat16."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _update(
    weight, gradient, first, second, lowered, scalars, count, beta1, beta2, epsilon, LOWERED: tl.constexpr, BLOCK: tl.constexpr
):
    """scalars: what the gradient is multiplied by, learning rate over the first bias correction, root of the second, and
    whether anything is to change."""
    if tl.load(scalars + 3) > 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(gradient + at, mask=inside, other=0.0) * tl.load(scalars)
        m = beta1 * tl.load(first + at, mask=inside, other=0.0) + (1 - beta1) * g
        v = beta2 * tl.load(second + at, mask=inside, other=0.0) + (1 - beta2) * g * g
        w = tl.load(weight + at, mask=inside, other=0.0)
        w -= tl.load(scalars + 1) * m / (tl.sqrt(v) / tl.load(scalars + 2) + epsilon)
        tl.store(weight + at, w, mask=inside)
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
        if LOWERED:
            tl.store(lowered + at, w.to(tl.bfloat16), mask=inside)


def update(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, lowered: Tensor | None, scalars: Tensor,
    betas: tuple[float, float], epsilon: float,
) -> None:  # fmt: skip
    """In place; all of the same strides and without gaps. lowered: weights in bfloat16. scalars `[4]`, see `_update`."""
    _update[(triton.cdiv(weight.numel(), _BLOCK),)](
        weight, gradient, first, second, weight if lowered is None else lowered, scalars, weight.numel(), *betas, epsilon,
        LOWERED=lowered is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def scalars(step: Tensor, rate: float, betas: tuple[float, float], coefficient: Tensor, bad: Tensor) -> Tensor:
    """For `update`, with step the number of this one, float32 `[]`."""
    first, second = (1 - torch.pow(beta, step.double()) for beta in betas)
    return torch.stack([coefficient.double(), rate / first, second.sqrt(), (~bad).double()]).float()
