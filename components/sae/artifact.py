"""SAE artifacts: a folder that SAELens 6 loads with `SAE.load_from_disk` (`cfg.json`, `sae_weights.safetensors`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from components.sae.relu import ReLUSAE

CONFIG_NAME, WEIGHTS_NAME = "cfg.json", "sae_weights.safetensors"
# The oldest SAELens whose format this is; its loader refuses files that name none or an older one.
_FORMAT_VERSION = "6.0.0"


def sae_files(sae: ReLUSAE, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The artifact's files by name, for an SAE that reads activations as the model makes them (see `ReLUSAE.folded`).

    metadata: what SAELens shows beside the SAE (`model_name`, `hook_name`, `context_size`, `prepend_bos`, ...).
    """
    config = {
        "architecture": "standard",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        # The paper's encoder reads x, not x - b_dec; SAELens defaults to the latter.
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _FORMAT_VERSION, "sae_lens_training_version": None, **metadata},
    }
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    return {CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(), WEIGHTS_NAME: save(tensors)}


def load_sae(folder: Path, device: torch.device) -> ReLUSAE:
    """The SAE in a local artifact folder; a ValueError for an architecture or option that this version cannot run."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    unsupported = {
        "architecture": "standard", "normalize_activations": "none", "reshape_activations": "none"
    }  # fmt: skip
    for key, accepted in unsupported.items():
        if config.get(key, accepted) != accepted:
            raise ValueError(f"{folder / CONFIG_NAME}: {key} is '{config[key]}'; '{accepted}' is accepted")
    sae = ReLUSAE(config["d_in"], config["d_sae"])
    sae.load_state_dict(load_file(folder / WEIGHTS_NAME))
    if config.get("apply_b_dec_to_input", True):
        # (x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc)
        with torch.no_grad():
            sae.b_enc.sub_(sae.b_dec @ sae.W_enc)
    return sae.to(device).eval().requires_grad_(False)
