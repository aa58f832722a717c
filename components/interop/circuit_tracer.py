"""circuit-tracer: a folder for the transcoders of a model's MLPs, `config.yaml` and `layer_N.safetensors`, read and written.

`f = act(x W_enc^T + b_enc)`, `y = f W_dec + b_dec + x W_skip^T`, with `W_enc` and `W_dec` both `[d_sae, d]`; a JumpReLU where
there is `activation_function.threshold`, else what `activation` says, a ReLU. One layer of the set is one coder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from components.interop.coders import (
    AnySAE,
    NormalizedSAE,
    read_safetensors,
    renamed,
    require_k,
    require_sizes,
    require_values,
)
from components.interop.names import TRANSCODER, Kind, kind_of

CONFIG_NAME, LAYER = "config.yaml", re.compile(r"layer_(\d+)\.safetensors")
_NAMES = {"W_enc": "W_enc.T", "activation_function.threshold": "threshold"}
_READS, _WRITES = "mlp.hook_in", "hook_mlp_out"
_WRITTEN = [Kind(reads, TRANSCODER, skip) for reads in ("standard", "jumprelu") for skip in (False, True)]


def read_config(folder: Path, address: str) -> dict[str, Any]:
    """In SAELens' terms, of the one layer whose file lies in the folder."""
    path = folder / CONFIG_NAME
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no configuration of transcoders: a mapping of fields is accepted")
    accepted: dict[str, tuple[Any, ...]] = {
        "model_kind": ("transcoder_set",), "activation": ("relu", "topk", "jumprelu", None)
    }  # fmt: skip
    require_values(path, found, accepted)
    name = _layer(folder).name
    try:
        with safe_open(folder / name, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / name} cannot be read: {error}") from error
    if any(len(shapes.get(key, ())) != 2 for key in ("W_enc", "W_dec")):
        raise ValueError(f"{folder / name}: W_enc and W_dec are accepted as matrices of features x dimensions")
    activation = "jumprelu" if "activation_function.threshold" in shapes else (found.get("activation") or "relu")
    if activation == "topk":
        require_sizes(path, found, "k")
        require_k(path, found["k"], shapes["W_enc"][0])
    number = (LAYER.fullmatch(name) or ("", ""))[1]
    hooks = {ours: found.get(theirs) for ours, theirs in _HOOKS.items()}
    metadata = {ours: f"blocks.{number}.{hook}" if hook else None for ours, hook in hooks.items()}
    return {
        "architecture": str(Kind("standard" if activation == "relu" else activation, TRANSCODER, "W_skip" in shapes)),
        "d_in": shapes["W_enc"][1],
        "d_out": shapes["W_dec"][1],
        "d_sae": shapes["W_enc"][0],
        **({"k": found["k"]} if activation == "topk" else {}),
        "apply_b_dec_to_input": False,
        "metadata": {"model_name": found.get("model_name"), **metadata},
    }


_HOOKS = {"hook_name": "feature_input_hook", "hook_name_out": "feature_output_hook"}


def read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    return renamed(read_safetensors(_layer(folder)), _NAMES)


def _layer(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if LAYER.fullmatch(path.name))
    if len(found) != 1:
        raise ValueError(
            f"{folder} holds {len(found)} layers; accepted is the address of one, such as FOLDER/layer_3.safetensors"
        )
    return found[0]


def circuit_tracer_files(sae: AnySAE, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The files of one layer by name. A ValueError for what circuit-tracer has no form for."""
    what = "SAE that normalises each token" if isinstance(sae, NormalizedSAE) else f"'{kind_of(sae)}'"
    if isinstance(sae, NormalizedSAE) or kind_of(sae) not in _WRITTEN:
        raise ValueError(f"format: circuit-tracer has no {what}, only ReLU and JumpReLU transcoders; accepted is saelens")
    places = [str(metadata.get(name)) for name in _HOOKS]
    reads, writes = (re.fullmatch(rf"{name}\.(\d+)", place) for name, place in zip(("mlp_in", "mlp_out"), places, strict=True))
    if reads is None or writes is None or reads[1] != writes[1] or sae.d_in != sae.d_out:
        raise ValueError(
            f"format: circuit-tracer's transcoders go from mlp_in.N to mlp_out.N, and not from '{places[0]}' to '{places[1]}'"
        )
    values = {name: value.detach().float().cpu() for name, value in sae.exported().tensors.items()}
    values["W_enc"] = values["W_enc"].T
    if "threshold" in values:
        values["activation_function.threshold"] = values.pop("threshold")
    model = metadata.get("model_name")
    config = {
        **({"model_name": model} if model else {}),
        "model_kind": "transcoder_set",
        "feature_input_hook": _READS,
        "feature_output_hook": _WRITES,
        "scan": model or "",  # it asks for one
    }
    weights = save({name: value.contiguous() for name, value in values.items()})
    return {CONFIG_NAME: yaml.safe_dump(config, sort_keys=False).encode(), f"layer_{reads[1]}.safetensors": weights}
