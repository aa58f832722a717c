"""Models and hook points by the names that others give them, to refuse an SAE that was trained somewhere else."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from torch.nn import LayerNorm

from components.interop.coders import is_centred, model_options
from components.interop.names import AUTOENCODER, CROSSCODER, TRANSCODER, Kind, columns_of, written_by
from components.language_model.architectures import KINDS
from components.language_model.hook_points import HookPoint, parse_hook_point
from components.language_model.source import ModelSource
from components.sae.coder import Column
from components.settings import UserError

_A = {AUTOENCODER: "an autoencoder", TRANSCODER: "a transcoder", CROSSCODER: "a crosscoder"}
_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_in": "mlp_in",
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
    lens = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name)
    if lens and lens[2] in _TRANSFORMER_LENS:
        return HookPoint(_TRANSFORMER_LENS[lens[2]], int(lens[1]))
    module = re.fullmatch(r"(?:model\.layers|transformer\.h|gpt_neox\.layers|layers|h)\.(\d+)", name)
    return HookPoint("resid_post", int(module[1])) if module else None


def require_same_place(config: dict[str, Any], reads: Sequence[Column], writes: Sequence[Column], source: ModelSource) -> None:
    """A UserError where a coder's configuration (in SAELens' terms) says that it does not belong where this one reads and
    writes."""
    wrong = other_place(config, reads, writes, source)
    if wrong is not None:
        raise UserError(f"--sae: {wrong}")


def other_place(config: dict[str, Any], reads: Sequence[Column], writes: Sequence[Column], source: ModelSource) -> str | None:
    """How a coder's configuration says that it does not belong where this one reads and writes, None where it may."""
    kind = Kind.parse(config["architecture"]) if "architecture" in config else None
    theirs, ours = kind.writes if kind else AUTOENCODER, written_by(reads, writes)
    if theirs != ours:
        fields = "training.hook_point, training.target and training.crosscoder"
        return f"it is {_A[theirs]}; {fields} ask for {_A[ours]}, which is accepted"
    if ours == CROSSCODER:
        found = [(column.name, column.width) for column in columns_of(config)[0]]
        asked = [(column.name, column.width) for column in reads]
        return None if found == asked else f"it is of {found}; training.crosscoder asks for {asked}"
    metadata = config.get("metadata") or {}
    read, written = parse_hook_point(reads[0].name), parse_hook_point(writes[0].name)
    wrong = _elsewhere(
        metadata.get("hook_name") or config.get("hook_name"), read, ("reads", config["d_in"], reads[0].width),
        ("training.hook_point", "activations.hook_points"),
    )  # fmt: skip
    if wrong is None and ours == TRANSCODER:
        wrong = _elsewhere(
            metadata.get("hook_name_out") or config.get("hook_name_out"), written,
            ("writes", config["d_out"], writes[0].width), ("training.target", "training.target"),
        )  # fmt: skip
    return wrong or _other_processing(config, read, source)


def _elsewhere(name: Any, point: HookPoint, width: tuple[str, int, int], fields: tuple[str, str]) -> str | None:
    """width: what it does there, with how many dimensions, and how many there are. fields: that say `point`, and that would
    say the other."""
    does, has, wanted = width
    if has != wanted:
        return f"it {does} {has} dimensions; '{point}' of this language model has {wanted}"
    # a module's path may leave out what is above the blocks
    here = name is not None and f".{point}".endswith(f".{name}")
    named = point if here else None if name is None else hook_point_of(str(name))
    if name is None:
        logger.warning("the SAE does not say at which hook point it belongs; taken for %s", point)
    # what leaves one block enters the next
    elif named is None or _as_output(named) != _as_output(point):
        give = "; give a hook point of that name" if named is None else f", give {fields[1]}={named}"
        return f"it was trained at '{name}'; {fields[0]} is '{point}'{give}"
    return None


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
