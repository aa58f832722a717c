"""A steered model as a plain transformers model, where the edit allows it: a constant that is added to the residual stream is
a bias of the MLP before it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.evaluation.splicing import mlp_output
from components.language_model.architectures import blocks
from components.language_model.hook_points import HookPoint, spliced_logits
from components.settings import UserError

_ALLOWED = 1e-3


@torch.no_grad()
def with_bias(model: nn.Module, point: HookPoint, vector: Tensor) -> nn.Module:
    """A copy of the model that adds `vector` `[d_model]` at `point` on every token; a UserError where it has no place."""
    layer = point.layer if point.kind in ("resid_post", "mlp_out") else None
    if point.kind == "resid_pre" and point.layer:
        layer = point.layer - 1
    if layer is None or point.tower:
        raise UserError(
            f"--save: nothing before '{point}' adds to it; accepted are resid_post, mlp_out and, after block 0, resid_pre"
        )
    changed = deepcopy(model)
    last = mlp_output(changed, HookPoint("mlp_out", layer))
    if last is not None and getattr(last, "bias", None) is None and getattr(changed.config, "mlp_bias", None) is False:
        _with_mlp_biases(changed)
    bias = getattr(last, "bias", None)
    if not isinstance(bias, Tensor) or bias.shape != vector.shape:
        raise UserError(f"--save: the MLP of block {layer} of {type(model).__name__} has no bias that could hold the edit")
    bias += vector.to(bias)
    probe = torch.arange(1, 9, device=bias.device)[None]
    wanted = spliced_logits(model, point, lambda x: x + vector.to(x), probe)
    if not torch.allclose(spliced_logits(changed, point, lambda _: None, probe), wanted, rtol=_ALLOWED, atol=_ALLOWED):
        raise UserError(
            f"--save: what the MLP of {type(model).__name__} adds passes through more before '{point}'; it cannot hold the edit"
        )
    return changed


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--save: '{folder}' is not empty; name a new or empty folder")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _with_mlp_biases(model: Any) -> None:
    """The architecture has biases in its MLPs where its configuration says so: zero, but for the one."""
    model.config.mlp_bias = True
    block: Any
    for block in blocks(model)[1]:
        for module in block.mlp.modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                zeros = torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
                module.bias = nn.Parameter(zeros, requires_grad=False)
