"""Gemma Scope, 1 (`params.npz`) and 2 (`params.safetensors` and `config.json`): JumpReLU that reads x and not `x - b_dec`.

`W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`, `b_enc`, `b_dec`, `threshold [d_sae]`, of a transcoder of Gemma Scope 2 also
`affine_skip_connection [d_in, d_out]`; names may be in lower case. The transcoders of the first read what comes before the gain
of the MLP's norm, which no hook point is, and are refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from components.interop.coders import read_mapping, read_safetensors, renamed, require_values
from components.interop.names import AUTOENCODER, TRANSCODER, Kind

NPZ_NAME, CONFIG_NAME, WEIGHTS_NAME = "params.npz", "config.json", "params.safetensors"
_NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip.T"}
_SITES = {"res": "resid_post.{}", "mlp": "mlp_out.{}", "att": "model.layers.{}.self_attn.o_proj:in"}


def read_npz_config(folder: Path, address: str) -> dict[str, Any]:
    """In SAELens' terms. Model and hook point are in the address alone: `gemma-scope-2b-pt-res/layer_20/width_16k/...`."""
    for other in ("transcoder", "embedding"):
        if other in address:
            raise ValueError(
                f"{address}: '{other}' is in its name; accepted are Gemma Scope's SAEs of res, mlp and att, "
                "and the transcoders of Gemma Scope 2"
            )
    with _arrays(folder / NPZ_NAME) as arrays:
        sizes = {"d_in": arrays["b_dec"].size, "d_sae": arrays["b_enc"].size}
    layer, site = re.search(r"layer_(\d+)", address), re.search(r"-(res|mlp|att)\b", address)
    model = re.search(r"gemma-scope-(\d+b)-(pt|it)", address)
    metadata = {
        "hook_name": _SITES[site[1]].format(layer[1]) if site and layer else None,
        "model_name": f"google/gemma-2-{model[1]}{'-it' if model[2] == 'it' else ''}" if model else None,
    }
    return {"architecture": "jumprelu", **sizes, "apply_b_dec_to_input": False, "metadata": metadata}


def read_npz_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    with _arrays(folder / NPZ_NAME) as arrays:
        return renamed({name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}, _NAMES)


@contextmanager
def _arrays(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_config(folder: Path, address: str) -> dict[str, Any]:
    """Of Gemma Scope 2, in SAELens' terms."""
    path = folder / CONFIG_NAME
    found = read_mapping(path)
    reads, writes = found.get("hf_hook_point_in"), found.get("hf_hook_point_out")
    transcodes = writes not in (None, reads)
    affine = (True, False, None) if transcodes else (False, None)
    require_values(path, found, {"architecture": ("jump_relu",), "affine_connection": affine})
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as tensors:
            encoder = next((name for name in ("W_enc", "w_enc") if name in tensors.keys()), "W_enc")  # noqa: SIM118
            sizes = dict(zip(("d_in", "d_sae"), tensors.get_slice(encoder).get_shape(), strict=True))
            written = tensors.get_slice("b_dec").get_shape()[0]
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} cannot be read: {error}") from error
    metadata = {"hook_name": _hook_point(reads), "model_name": _model(found.get("model_name"))}
    if transcodes:
        metadata["hook_name_out"] = _hook_point(writes)
        sizes["d_out"] = written
    kind = Kind("jumprelu", TRANSCODER if transcodes else AUTOENCODER, bool(found.get("affine_connection")))
    return {"architecture": str(kind), **sizes, "apply_b_dec_to_input": False, "metadata": metadata}


def read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    return renamed(read_safetensors(folder / WEIGHTS_NAME), _NAMES)


def _hook_point(name: Any) -> str | None:
    """`model.layers.6.output` is `resid_post.6`. An MLP reads what its norm gives, `mlp_in.6`, and what Gemma adds of it comes
    after another norm, `mlp_out.6`."""
    if not isinstance(name, str):
        return None
    norm = re.fullmatch(r"model\.layers\.(\d+)\.(pre|post)_feedforward_layernorm\.output", name)
    return (
        f"mlp_{'in' if norm[2] == 'pre' else 'out'}.{norm[1]}"
        if norm
        else re.sub(r"\.input$", ":in", name.removesuffix(".output"))
    )


def _model(name: Any) -> str | None:
    """Its configurations say `gemma-v3-270m-pt` of what is called `gemma-3-270m`."""
    if not isinstance(name, str):
        return None
    return re.sub("270m-pt$", "270m", name.replace("-v3-", "-3-"))
