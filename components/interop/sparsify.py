"""sparsify (EleutherAI): a folder per hook point with `cfg.json` and `sae.safetensors`, written and read; TopK alone.

`f = TopK(relu((x - b_dec) W^T + b))`, `x_hat = f W_dec + b_dec`, with `encoder.weight` and `W_dec` both `[d_sae, d_in]`. A
transcoder (`transcode`) reads x itself, and may have `W_skip` (`skip_connection`): `+ x W_skip^T`. It writes as many dimensions
as it reads; its folder is named after a module, whose input it reads and whose output it writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from components.interop.coders import (
    AnySAE,
    NormalizedSAE,
    read_mapping,
    read_safetensors,
    renamed,
    require_k,
    require_sizes,
    require_values,
)
from components.interop.names import CROSSCODER, TRANSCODER, Kind, kind_of

CONFIG_NAME, WEIGHTS_NAME = "cfg.json", "sae.safetensors"


def read_config(folder: Path, address: str) -> dict[str, Any]:
    """In SAELens' terms. The folder's name is that of the hook point: `layers.6`, `layers.6.mlp`."""
    path = folder / CONFIG_NAME
    found = read_mapping(path)
    accepted: dict[str, tuple[Any, ...]] = {
        "activation": ("topk", None),
        "signed": (False, None),  # of earlier versions
        "transcode": (True, False, None),
        "skip_connection": (True, False, None) if found.get("transcode") else (False, None),
    }
    require_values(path, found, accepted)
    require_sizes(path, found, "d_in", "k", *(() if found.get("num_latents") else ("expansion_factor",)))
    sizes = {**found, "num_latents": found.get("num_latents") or found["d_in"] * found["expansion_factor"]}
    require_sizes(path, sizes, "num_latents")
    require_k(path, found["k"], sizes["num_latents"])
    name = address.rstrip("/").rsplit("/", 1)[-1]
    metadata = found.get("metadata")  # ours; sparsify passes over it
    if not isinstance(metadata, dict):
        metadata = {"hook_name": name if _is_module(name) else None}
        if found.get("transcode") and _is_module(name):
            metadata = {"hook_name": f"{name}:in", "hook_name_out": name}
    transcodes = bool(found.get("transcode"))
    return {
        "architecture": str(Kind("topk", TRANSCODER, bool(found.get("skip_connection"))) if transcodes else Kind("topk")),
        **({"d_out": found["d_in"]} if transcodes else {}),
        "d_in": found["d_in"],
        "d_sae": sizes["num_latents"],
        "k": found["k"],
        "apply_b_dec_to_input": not transcodes,
        "metadata": metadata,
    }


def _is_module(name: str) -> bool:
    return re.fullmatch(r"([A-Za-z_]+\.)+\d+(\.\w+)*", name) is not None


def read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    names = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc"}
    return renamed(read_safetensors(folder / WEIGHTS_NAME), names)


def sparsify_files(sae: AnySAE, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The folder's files by name. A ValueError for what sparsify has no form for."""
    if isinstance(sae, NormalizedSAE):
        raise ValueError("format: sparsify has no normalisation of tokens; accepted for such an SAE is saelens")
    exported, kind = sae.exported(), kind_of(sae)
    if kind.reads != "topk" or kind.writes == CROSSCODER or sae.d_out != sae.d_in:
        what = f"'{kind}' of {sae.d_in} to {sae.d_out}" if sae.d_out != sae.d_in else f"'{kind}'"
        raise ValueError(f"format: sparsify has no {what}, only topk of one width; accepted for it is saelens")
    transcodes = kind.writes == TRANSCODER
    values = {name: value.detach().double().cpu() for name, value in exported.tensors.items()}
    tensors = {
        "encoder.weight": values["W_enc"].T,
        # of an autoencoder it takes b_dec from the input, ours does not
        "encoder.bias": values["b_enc"] if transcodes else values["b_enc"] + values["b_dec"] @ values["W_enc"],
        "W_dec": values["W_dec"],
        "b_dec": values["b_dec"],
        **({"W_skip": values["W_skip"]} if kind.skip else {}),
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": False,
        "num_latents": sae.d_sae,
        "k": exported.options["k"],
        "multi_topk": False,
        "skip_connection": kind.skip,
        "transcode": transcodes,
        "d_in": sae.d_in,
        "metadata": metadata,
    }
    weights = save({name: tensor.float().contiguous() for name, tensor in tensors.items()})
    return {CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(), WEIGHTS_NAME: weights}
