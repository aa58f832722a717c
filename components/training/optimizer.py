"""Adam with clipped gradients: torch's fused one, and on a GPU one that goes through memory once."""

from __future__ import annotations

import torch
from torch import Tensor

from components.sae.kernels.lowered import keep, room
from components.sae.kernels.rows import uses_triton

_LARGE = 1 << 20
"""Entries from which on memory decides how long a step takes, and not how many kernels it has."""


@torch.no_grad()
def update(optimizer: torch.optim.Adam, rate: float, norm: Tensor, limit: float, bad: Tensor, half: bool) -> None:
    """One step with gradients of this norm `[]`, scaled down to at most `limit`; none where `bad`, bool `[]`, which is not
    asked of the device. half: products are in bfloat16. The gradients are gone afterwards."""
    (group,) = optimizer.param_groups
    group["lr"] = rate
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    if uses_triton(parameters[0]) and max(parameter.numel() for parameter in parameters) >= _LARGE:
        _in_one_pass(optimizer, parameters, norm, limit, bad, half)
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as torch.amp's scaler sets it
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _in_one_pass(
    optimizer: torch.optim.Adam, parameters: list[torch.nn.Parameter], norm: Tensor, limit: float, bad: Tensor, half: bool
) -> None:
    """The state is where torch's own has it."""
    from components.sae.kernels.gpu import adam

    (group,) = optimizer.param_groups
    for parameter in parameters:
        if not optimizer.state[parameter]:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
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
