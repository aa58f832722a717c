"""SAELens 6: `cfg.json` and `sae_weights.safetensors`, written and read. Every artifact of ours is such a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from components.interop.coders import (
    NORMALIZATIONS,
    AnySAE,
    NormalizedSAE,
    coder_of,
    read_mapping,
    read_safetensors,
    require_k,
    require_sizes,
    require_values,
)
from components.interop.names import (
    AUTOENCODER,
    CROSSCODER,
    READS,
    TRANSCODER,
    Kind,
    kind_of,
    placed,
)

CONFIG_NAME, WEIGHTS_NAME = "cfg.json", "sae_weights.safetensors"
# The oldest SAELens whose format this is; its loader refuses files that name none or an older one.
_FORMAT_VERSION = "6.0.0"
ACCEPTED = f"{', '.join(READS)}, or transcoder, skip_transcoder or crosscoder, alone or behind topk_, jumprelu_ or gated_"
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def saelens_files(sae: AnySAE, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The folder's files by name, for a coder that reads activations as the model makes them (see `Coder.folded`).

    metadata: what SAELens shows beside it (`model_name`, `hook_name`, `context_size`, `prepend_bos`, ...).
    """
    coder, normalization = (sae.coder, sae.normalization) if isinstance(sae, NormalizedSAE) else (sae, "none")
    exported = coder.exported()
    config = {
        "architecture": str(kind_of(coder)),
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        **placed(coder),
        **exported.options,
        "dtype": "float32",
        "device": "cpu",
        # The encoder reads x, not x - b_dec; SAELens defaults to the latter.
        "apply_b_dec_to_input": False,
        "normalize_activations": normalization,
        "reshape_activations": "none",
        "metadata": {**metadata, "sae_lens_version": _FORMAT_VERSION, "sae_lens_training_version": None},
    }
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in exported.tensors.items()}
    return {CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(), WEIGHTS_NAME: save(tensors)}


def load_saelens(folder: Path, device: torch.device, mean_norm: float | None = None) -> AnySAE:
    """The coder in a local folder, for use and not for training; a ValueError in one sentence for anything that this cannot
    run as SAELens would. mean_norm: see `coders.coder_of`."""
    config = read_config(folder)
    return coder_of(config, read_tensors(folder, config), device, mean_norm)


def read_config(folder: Path, address: str = "") -> dict[str, Any]:
    """`cfg.json` of a folder; a ValueError unless it describes an SAE that `load_saelens` runs."""
    path = folder / CONFIG_NAME
    config = read_mapping(path)
    metadata = config.get("metadata") or {}
    options = metadata.get("model_from_pretrained_kwargs") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(options, dict | None):
        raise ValueError(f"{path} is no configuration of an SAE: a mapping of fields is accepted")
    accepted: dict[str, tuple[Any, ...]] = {
        "normalize_activations": (*NORMALIZATIONS, None),
        "reshape_activations": ("none", None),
        "dtype": (*_DTYPES, *(f"torch.{name}" for name in _DTYPES), None),
        "apply_b_dec_to_input": (True, False, None),
        "rescale_acts_by_decoder_norm": (True, False, None),
        # of SAELens before 6
        "activation_fn": ("relu", None),
        "activation_fn_str": ("relu", None),
        "finetuning_scaling_factor": (False, None),
        "hook_head_index": (None,),
    }
    kind = Kind.parse(str(config.get("architecture")))
    if kind is None:
        raise ValueError(f"{path}: architecture is '{config.get('architecture')}'; accepted is {ACCEPTED}")
    if kind.writes != AUTOENCODER:  # as SAELens has it
        accepted |= {"normalize_activations": ("none", None), "apply_b_dec_to_input": (False, None)}
    require_values(path, config, accepted)
    if metadata.get("hook_head_index") is not None:
        raise ValueError(f"{path}: it reads one attention head; SAEs of a whole hook point are accepted")
    sizes = ["d_in", "d_sae", *["k"] * (kind.reads == "topk"), *["d_out"] * (kind.writes == TRANSCODER)]
    require_sizes(path, config, *sizes)
    if kind.reads == "topk":
        require_k(path, config["k"], config["d_sae"])
    if kind.writes == CROSSCODER:
        require_columns(path, config)
    return config


def read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """In the precision that `dtype` names, since SAELens rounds to it as it loads."""
    dtype = getattr(torch, (config.get("dtype") or "float32").removeprefix("torch."))
    tensors = {name: tensor.to(dtype) for name, tensor in read_safetensors(folder / WEIGHTS_NAME).items()}
    scaling = tensors.get("scaling_factor")
    if scaling is not None and bool((scaling == 1).all()):  # left over from fine-tuning that was none
        del tensors["scaling_factor"]
    return tensors


def require_columns(path: Path, config: dict[str, Any]) -> None:
    found = config.get("columns")
    right = (
        isinstance(found, list)
        and len(found) > 1
        and all(isinstance(one, list) and [type(part) for part in one] == [str, int] and one[1] > 0 for one in found)
    )
    if not right or sum(width for _, width in found or ()) != config["d_in"]:
        raise ValueError(f"{path}: columns is {found!r}; accepted are pairs of hook point and width, in all d_in wide")
