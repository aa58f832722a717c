"""dictionary_learning: a folder per trainer with `config.json` and `ae.pt`, read as tensors and nothing else.

Activations that were divided by a `norm_factor` in training have their biases and thresholds multiplied with it in the final
`ae.pt`, which so reads activations as the model makes them. Features are as the classes encode them; the peer's loader of
`AutoEncoder` multiplies them with the decoder's norms besides.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.interop.coders import read_mapping, renamed, require_k, require_sizes, require_values

CONFIG_NAME, WEIGHTS_NAME = "config.json", "ae.pt"
# By class: architecture, and the name of the decoder's bias. Those that do not take it from the input are named below.
_CLASSES = {
    "AutoEncoder": ("standard", "bias"),
    "AutoEncoderNew": ("standard", "decoder.bias"),
    "GatedAutoEncoder": ("gated", "decoder_bias"),
    "JumpReluAutoEncoder": ("jumprelu", "b_dec"),
    "AutoEncoderTopK": ("topk", "b_dec"),
    "BatchTopKSAE": ("jumprelu", "b_dec"),
    "MatryoshkaBatchTopKSAE": ("jumprelu", "b_dec"),
}
_READS_X = ("AutoEncoderNew", "JumpReluAutoEncoder")
_NAMES = {
    "encoder.weight": "W_enc.T",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec.T",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}


def read_config(folder: Path, address: str) -> dict[str, Any]:
    """In SAELens' terms, and `dict_class` beside them."""
    path = folder / CONFIG_NAME
    trainer = read_mapping(path).get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError(f"{path} has no mapping `trainer`, which says of what class the dictionary is")
    require_values(path, trainer, {"dict_class": tuple(_CLASSES)})
    architecture, _ = _CLASSES[trainer["dict_class"]]
    require_sizes(path, trainer, "activation_dim", "dict_size", *(("k",) if architecture == "topk" else ()))
    config = {
        "architecture": architecture,
        "d_in": trainer["activation_dim"],
        "d_sae": trainer["dict_size"],
        "apply_b_dec_to_input": trainer["dict_class"] not in _READS_X,
        "dict_class": trainer["dict_class"],
        "metadata": {"model_name": trainer.get("lm_name"), "hook_name": _hook_point(trainer.get("submodule_name"))},
    }
    if architecture == "topk":
        require_k(path, trainer["k"], trainer["dict_size"])
        config["k"] = trainer["k"]
    return config


def _hook_point(submodule: Any) -> str | None:
    """`resid_post_layer_6` is what its scripts call `resid_post.6`; any other name stays."""
    match = re.fullmatch(r"(\w+)_layer_(\d+)", str(submodule))
    return f"{match[1]}.{match[2]}" if match else submodule


def read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        # Not torch's own words: they tell how to run what the file brings.
        raise ValueError(f"{path} cannot be read as tensors and nothing else ({type(error).__name__})") from error
    if isinstance(found, dict) and {"ae", "optimizer"} & found.keys():
        raise ValueError(f"{path} is the backup of a training that goes on; the `ae.pt` that it ends with is accepted")
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds something else than tensors by name")
    tensors: dict[str, Tensor] = {name: value for name, value in found.items() if name not in ("k", "group_sizes")}
    if config["architecture"] == "topk":
        tensors.pop("threshold", None)  # kept there too, and not used: it encodes by rank
        if "k" in found and found["k"].tolist() != config["k"]:
            raise ValueError(f"{path}: k is {found['k'].tolist()}; {CONFIG_NAME} has {config['k']}")
    elif "k" in found and (threshold := tensors.get("threshold")) is not None and threshold.ndim == 0:
        if threshold < 0:
            raise ValueError(f"{path}: threshold is {threshold:g}, which says that training ended before one was found")
        tensors["threshold"] = threshold.expand(config["d_sae"])
    return renamed(tensors, _NAMES | {_CLASSES[config["dict_class"]][1]: "b_dec"})
