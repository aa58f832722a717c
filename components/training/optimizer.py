"""Adam with clipped gradients: torch's fused kernel, and on a GPU one that goes through memory once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.sae.kernels.lowered import keep, room
from components.sae.kernels.rows import uses_triton

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LARGE = 1 << 20
"""Entries from which on memory decides how long a step takes, and not how many kernels it has."""


@torch.no_grad()
def update(optimizer: torch.optim.Adam, rate: float, norm: Tensor, limit: float, bad: Tensor, half: bool) -> None:
    """One step with gradients of this norm `[]`, scaled down to at most `limit`; none where `bad`, bool `[]`, which is not
    asked of the device. half: products are in bfloat16. The gradients are gone afterwards."""
    (group,) = optimizer.param_groups
    group["lr"] = rate
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in parameters:
        if not optimizer.state[parameter]:
            zeros = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    if uses_triton(parameters[0]) and max(parameter.numel() for parameter in parameters) >= _LARGE:
        _in_one_pass(optimizer, parameters, norm, limit, bad, half)
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        _by_torch(optimizer, parameters, bad)
    optimizer.zero_grad(set_to_none=True)


def _by_torch(optimizer: torch.optim.Adam, parameters: list[torch.nn.Parameter], bad: Tensor) -> None:
    """As `optimizer.step()` with `found_inf`, but for weights that lie in memory column by column: those it would copy."""
    (group,) = optimizer.param_groups
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    first, second = ([optimizer.state[parameter][name] for parameter in parameters] for name in _MOMENTS)
    by_row = [parameter.is_contiguous() for parameter in parameters]

    def in_order(values: Sequence[Tensor]) -> list[Tensor]:
        return [value if rows else value.T for value, rows in zip(values, by_row, strict=True)]

    torch._foreach_add_(steps, 1.0)
    found = bad.float()
    torch._fused_adam_(
        in_order(parameters),
        in_order(gradients),
        in_order(first),
        in_order(second),
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=found,
    )
    torch._foreach_sub_(steps, [found] * len(steps))


def _in_one_pass(
    optimizer: torch.optim.Adam, parameters: list[torch.nn.Parameter], norm: Tensor, limit: float, bad: Tensor, half: bool
) -> None:
    """The state is where torch's own has it."""
    from components.sae.kernels.gpu import adam

    (group,) = optimizer.param_groups
    states = [optimizer.state[parameter] for parameter in parameters]
    for state in states:
        state["step"] += bad.logical_not()
    coefficient = (limit / (norm + 1e-6)).clamp(max=1.0)
    scalars = adam.scalars(states[0]["step"], group["lr"], group["betas"], coefficient, bad)
    for parameter, state in zip(parameters, states, strict=True):
        gradient = parameter.grad
        assert gradient is not None
        if gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        lowered = room(parameter) if half and parameter.numel() >= _LARGE else None
        adam.update(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], lowered, scalars, group["betas"], group["eps"])
        torch.autograd.graph.increment_version(parameter)
        if lowered is not None:
            keep(parameter, lowered)
