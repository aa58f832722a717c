"""delphi's cache of latents: `latents/<hookpoint>/<first>_<last>.safetensors` and `config.json`.

Each file holds `locations` `[n, 3]` (sequence, place, feature less `first`), `activations` float16 `[n]` and `tokens`
`[sequences, context_length]`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from components.interpretation.activations import Pass, at_once
from components.language_model.hook_points import HookPoint

SPLITS = 5
_LEAST = 1e-5
"""As delphi: what is smaller is no activation."""
_LARGEST = float(np.finfo(np.float16).max)
_NAMES = {"resid_post": "layers.{}", "mlp_out": "layers.{}.mlp", "attn_out": "layers.{}.self_attn"}


def write(folder: Path, held_out: Pass, point: HookPoint, model_name: str, dataset: str) -> int:
    """One pass over the text. Memory: 14 bytes per activation, and the tokens. The number of activations."""
    locations, activations, tokens = [], [], []
    for batch in held_out.batches():
        found = batch.firings()
        where = torch.stack([batch.numbers[found.rows[found.tokens]], found.places[found.tokens], found.features], dim=1)
        large = found.values > _LEAST
        where, values = where[large], found.values[large].clamp(max=_LARGEST)
        locations.append(where.cpu().numpy().astype(np.uint32))
        activations.append(values.cpu().numpy().astype(np.float16))
        tokens.append(batch.block.tokens)
    # Both are there although empty, where nothing fires.
    place = np.concatenate([np.zeros((0, 3), np.uint32), *locations])
    value = np.concatenate([np.zeros(0, np.float16), *activations])
    text = np.concatenate(tokens).astype(np.int64)
    target = folder / "latents" / hookpoint(point)
    target.mkdir(parents=True)
    edges = np.linspace(0, held_out.d_sae, min(SPLITS, held_out.d_sae) + 1).astype(int).tolist()
    for first, stop in pairwise(edges):
        own = (place[:, 2] >= first) & (place[:, 2] < stop)
        part = place[own] - np.array([0, 0, first], np.uint32)
        small = len(part) == 0 or int(part[:, [0, 2]].max()) < 2**16
        kept = {"locations": part.astype(np.uint16 if small else np.uint32), "activations": value[own], "tokens": text}
        save_file(kept, target / f"{first}_{stop - 1}.safetensors")
    length = held_out.text.manifest.context_length
    config: dict[str, Any] = {
        "dataset_repo": dataset, "dataset_split": "held_out", "dataset_name": "", "dataset_column": "text",
        "batch_size": at_once(held_out.text, held_out.d_sae),
        "cache_ctx_len": length, "ctx_len": length, "n_tokens": int(text.size),
        "n_splits": len(edges) - 1, "model_name": model_name,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=4))
    return len(value)


def hookpoint(point: HookPoint) -> str:
    """As delphi names it: the module's path in the language model's body."""
    known = _NAMES.get(point.kind) if not point.tower else None
    return str(point) if known is None or point.layer is None else known.format(point.layer)
