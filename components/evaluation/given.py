"""Hook points by the names that SAELens gives them, to refuse an SAE that was trained somewhere else."""

from __future__ import annotations

import logging
import re
from typing import Any

from components.language_model.architectures import KINDS
from components.language_model.hook_points import HookPoint
from components.settings import UserError

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
}

logger = logging.getLogger(__name__)


def hook_point_of(name: str) -> HookPoint | None:
    """The hook point behind `blocks.6.hook_resid_pre` (TransformerLens), `model.layers.6` (a module's output) or our own
    names; None for any other."""
    own = re.fullmatch(rf"({'|'.join(KINDS)})\.(\d+)", name)
    if own:
        return HookPoint(own[1], int(own[2]))
    lens = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name)
    if lens and lens[2] in _TRANSFORMER_LENS:
        return HookPoint(_TRANSFORMER_LENS[lens[2]], int(lens[1]))
    module = re.fullmatch(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)", name)
    return HookPoint("resid_post", int(module[1])) if module else None


def require_same_place(config: dict[str, Any], point: HookPoint, d_in: int) -> None:
    """A UserError where an SAE's `cfg.json` says that it does not belong at `point`."""
    if config["d_in"] != d_in:
        raise UserError(f"--sae: it reads {config['d_in']} dimensions; '{point}' of this language model has {d_in}")
    name = (config.get("metadata") or {}).get("hook_name") or config.get("hook_name")
    named = point if name == str(point) else None if name is None else hook_point_of(str(name))
    if named is None:
        logger.warning("evaluate: the SAE does not say at which hook point it belongs (%s); taken for %s", name, point)
    # what leaves one block enters the next
    elif _as_output(named) != _as_output(point):
        raise UserError(
            f"--sae: it was trained at '{name}'; training.hook_point is '{point}', give activations.hook_points={named}"
        )


def _as_output(point: HookPoint) -> HookPoint:
    return HookPoint("resid_post", point.layer - 1) if point.kind == "resid_pre" and point.layer else point
