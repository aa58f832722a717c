"""Models and hook points by the names that others give them, to refuse an SAE that was trained somewhere else."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch.nn import LayerNorm

from components.interop.coders import is_centred, model_options
from components.language_model.architectures import KINDS
from components.language_model.hook_points import HookPoint
from components.language_model.source import ModelSource
from components.settings import UserError

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
}

logger = logging.getLogger(__name__)


_CENTRED = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""Where nothing is written but by weights that TransformerLens centres: a token's mean over dimensions is 0 there."""
_OTHER_NAMES = {"gpt2-small": "gpt2"}  # of TransformerLens


def hook_point_of(name: str) -> HookPoint | None:
    """The hook point behind `blocks.6.hook_resid_pre` (TransformerLens), `model.layers.6` or `layers.6` (a module's output) or
    our own names; None for any other."""
    own = re.fullmatch(rf"({'|'.join(KINDS)})\.(\d+)", name)
    if own:
        return HookPoint(own[1], int(own[2]))
    lens = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name)
    if lens and lens[2] in _TRANSFORMER_LENS:
        return HookPoint(_TRANSFORMER_LENS[lens[2]], int(lens[1]))
    module = re.fullmatch(r"(?:model\.layers|transformer\.h|gpt_neox\.layers|layers|h)\.(\d+)", name)
    return HookPoint("resid_post", int(module[1])) if module else None


def require_same_place(config: dict[str, Any], point: HookPoint, d_in: int, source: ModelSource) -> None:
    """A UserError where an SAE's configuration (in SAELens' terms) says that it does not belong at `point`."""
    wrong = other_place(config, point, d_in, source)
    if wrong is not None:
        raise UserError(f"--sae: {wrong}")


def other_place(config: dict[str, Any], point: HookPoint, d_in: int, source: ModelSource) -> str | None:
    """How an SAE's configuration says that it does not belong at `point`, None where it may."""
    if config["d_in"] != d_in:
        return f"it reads {config['d_in']} dimensions; '{point}' of this language model has {d_in}"
    name = (config.get("metadata") or {}).get("hook_name") or config.get("hook_name")
    # a module's path may leave out what is above the blocks
    here = name is not None and f".{point}".endswith(f".{name}")
    named = point if here else None if name is None else hook_point_of(str(name))
    if name is None:
        logger.warning("the SAE does not say at which hook point it belongs; taken for %s", point)
    # what leaves one block enters the next
    elif named is None or _as_output(named) != _as_output(point):
        give = "; give a hook point of that name" if named is None else f", give activations.hook_points={named}"
        return f"it was trained at '{name}'; training.hook_point is '{point}'{give}"
    return _other_processing(config, point, source)


def _other_processing(config: dict[str, Any], point: HookPoint, source: ModelSource) -> str | None:
    """Of the weights, by TransformerLens, as it loaded the model that the SAE was trained on."""
    options = model_options(config)
    for key in ("revision", "checkpoint_index", "checkpoint_value"):
        if options.get(key) not in (None, source.settings.revision):
            return f"model_from_pretrained_kwargs.{key} is '{options[key]}'; accepted is language_model.revision"
    if not is_centred(config):
        return None
    if point.kind not in _CENTRED:
        return f"center_writing_weights is true; accepted at {', '.join(_CENTRED)}, and not at '{point}'"
    if not any(isinstance(module, LayerNorm) for module in source.skeleton.modules()):
        return "center_writing_weights is true; accepted for models with LayerNorm, which this one has not"
    return None


def require_same_model(config: dict[str, Any], ours: str) -> None:
    """A UserError where an SAE names another language model than ours."""
    wrong = other_model(config, ours)
    if wrong is not None:
        raise UserError(f"--sae: {wrong}; --another-model takes it there all the same")


def other_model(config: dict[str, Any], ours: str) -> str | None:
    """Which other language model an SAE names, None where it is ours; owner, folder and case of a name do not count."""
    theirs = (config.get("metadata") or {}).get("model_name") or config.get("model_name")
    if theirs is None or _bare(str(theirs)) == _bare(ours):
        return None
    return f"its model_name is '{theirs}'; language_model.name is '{ours}'"


def _bare(name: str) -> str:
    bare = re.sub(r"[^a-z0-9]+", "-", name.rstrip("/").rsplit("/", 1)[-1].lower())
    return _OTHER_NAMES.get(bare, bare)


def _as_output(point: HookPoint) -> HookPoint:
    return HookPoint("resid_post", point.layer - 1) if point.kind == "resid_pre" and point.layer else point
