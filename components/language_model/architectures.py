"""Where transformers keeps things: which class loads a model, where its blocks are, and what in a block is a sublayer.

Everything is read from the configuration and from the modules' names, so a skeleton without weights is enough.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import nn

from components.settings import UserError

Family = Literal["causal", "encoder", "vision", "vision_language"]
"""What a model reads and gives: text to next-token logits, text to states, images to states, both to logits."""

KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_in", "mixer_out")
SECOND = "second"
TOWERS = ("", "vision")
"""Which of a model's stacks of blocks a uniform name means: its own (of a vision-language model the text decoder), or
the vision tower of a vision-language model."""

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_MIXER = ("mixer", "mamba", "linear_attn")
# Blocks that scale or mix the residual stream themselves: there no module's output is what a sublayer adds.
_SCALED_RESIDUAL = ("residual_multiplier", "residual_scale", "lambda_1", "input_residual", "altup")


class TwoModels(nn.Module):
    """Two language models that read the same tokens; what is asked of one of them is asked of that one, see
    `hook_points.within`."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


def family_of(config: Any) -> Family:
    """What kind of model a transformers configuration describes; a UserError for one that is none of ours."""
    from transformers.models.auto import modeling_auto as auto

    kind = getattr(config, "model_type", "")
    name = (getattr(config, "architectures", None) or [""])[0]
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind)
    remote = getattr(config, "auto_map", None) or {}
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"language_model.name: {name or kind} is an encoder-decoder model, which is not supported; accepted are causal "
            "language models, text encoders, vision transformers and vision-language models"
        )
    if kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config"):
        return "vision_language"
    if hasattr(config, "patch_size") or hasattr(config, "vision_config"):
        return "vision"
    if "AutoModelForCausalLM" in remote or (causal is not None and (masked is None or name == causal)):
        return "causal"
    return "encoder"


def model_config(config: Any) -> Any:
    """The part of the configuration that is loaded: the image half of a pair such as CLIP, otherwise all of it."""
    return config.vision_config if family_of(config) == "vision" and hasattr(config, "vision_config") else config


def model_class(config: Any, with_head: bool = False) -> Any:
    """The transformers class that loads it. Encoders are loaded without a head, which no hook point needs, but for
    `with_head`, see `classifies`."""
    import transformers

    if with_head:
        return transformers.AutoModelForImageClassification
    name = {"causal": "AutoModelForCausalLM", "vision_language": "AutoModelForImageTextToText"}
    return getattr(transformers, name.get(family_of(config), "AutoModel"))


def classifies(config: Any) -> bool:
    """Whether a vision transformer was saved with a head that tells classes of images."""
    from transformers.models.auto import modeling_auto as auto

    known = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(getattr(config, "model_type", ""))
    first = known[0] if isinstance(known, (tuple, list)) else known
    return family_of(config) == "vision" and first is not None and (getattr(config, "architectures", None) or [""])[0] == first


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The submodule that turns images into states, of a model that reads text as well; None where there is none."""
    tower = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else model  # type: ignore[operator]
    return tower if isinstance(tower, nn.Module) and tower is not model and tower is not model.base_model else None


def blocks(model: nn.Module, tower: str = "") -> tuple[str, nn.ModuleList]:
    """Path and modules of a tower's blocks: the one outermost list that is as long as its configuration says."""
    root = vision_tower(model) if tower else model.get_decoder()  # type: ignore[operator]
    if root is None:
        raise UserError(f"language_model.name: {type(model).__name__} has no vision tower of its own")
    config = getattr(root, "config", None)
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", None)
    found: dict[str, nn.ModuleList] = {}
    for path, module in root.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and layers in (None, len(module)):
            found[path] = module
    if len(found) != 1:
        raise UserError(
            f"language_model.name: the blocks of {type(model).__name__} are not known ({len(found)} lists fit); "
            "name hook points by module path, such as model.layers.3.mlp"
        )
    ((path, modules),) = found.items()
    prefix = next(name for name, module in model.named_modules() if module is root)
    return ".".join(part for part in (prefix, path) if part), modules


def width(model: nn.Module, tower: str = "") -> int:
    """Width of a tower's residual stream, `d_model`."""
    root: Any = vision_tower(model) if tower else model.get_decoder()  # type: ignore[operator]
    return int(root.config.get_text_config().hidden_size)


def sublayer(block: nn.Module, kind: str) -> tuple[str, bool] | None:
    """Path inside the block of the module whose input (True) or output (False) is the hook point `kind`; None where the
    block has no such place.

    `attn_out`, `mlp_out` and `mixer_out` are what is added to the residual stream: after the norm or scale that some
    architectures put on a sublayer's output.
    """
    if kind in ("resid_pre", "resid_post"):
        return "", kind == "resid_pre"
    if kind == "mlp_in":
        path = _first(block, ("intermediate", *_MLP, "fc1"))
        return None if path is None else (path, True)
    if any(getattr(block, name, None) is not None for name in _SCALED_RESIDUAL):
        return None
    if kind == "mixer_out":
        names: tuple[str, ...] = _MIXER
    elif kind == "attn_out":
        if _first(block, _ATTENTION) is None:
            return None
        # Gemma 2 and 3, OLMo 2; GLM 4; DINOv2; BERT, whose own output module adds the residual stream
        names = (*_attention_norms(block), "layer_scale1", "attention.output.dense", *_ATTENTION)
    else:
        norms = ("post_feedforward_layernorm", "post_mlp_layernorm") if _attention_norms(block) else ()
        bert = ("output.dense",) if _first(block, ("intermediate",)) else ()
        names = (*norms, "layer_scale2", *bert, *_MLP, "fc2")
    path = _first(block, names)
    if path is None or _adds_residual(block.get_submodule(path)):
        return None
    return path, False


def _attention_norms(block: nn.Module) -> tuple[str, ...]:
    if hasattr(block, "post_feedforward_layernorm"):
        return ("post_attention_layernorm",)
    if hasattr(block, "post_mlp_layernorm") and hasattr(block, "input_layernorm"):
        return ("post_self_attn_layernorm", "post_attention_layernorm")
    return ()


def _first(block: nn.Module, paths: tuple[str, ...]) -> str | None:
    for path in paths:
        try:
            block.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None


def _adds_residual(module: nn.Module) -> bool:
    """Whether a sublayer gets the residual stream in order to add it itself (BLOOM, MPT)."""
    return "residual" in inspect.signature(module.forward).parameters
