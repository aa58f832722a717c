"""SAELens 6: folders with `cfg.json` and `sae_weights.safetensors`, written and read.

Every artifact of ours is such a folder. One that others made becomes one of our own classes: whatever can be folded into the
weights is folded when it is loaded, so that a coder here reads `pre = norm(x) W_enc + b_enc` and writes
`x_hat = unnorm(f W_dec + b_dec)`:

- `apply_b_dec_to_input`: `(x - b_dec) W_enc + b = x W_enc + (b - b_dec W_enc)`;
- `rescale_acts_by_decoder_norm` of TopK: norms move from the decoder into the encoder;
- `expected_average_only_in`: the scalar `sqrt(d_in) / mean ||x||`, as SAELens itself folds it after training.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from components.sae.architectures.gated import GatedSAE, GatedSettings
from components.sae.architectures.jumprelu import JumpReLUSAE, JumpReLUSettings
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.architectures.topk import TopKSAE, TopKSettings
from components.sae.coder import Coder
from components.sae.features import Features

CONFIG_NAME, WEIGHTS_NAME = "cfg.json", "sae_weights.safetensors"
# The oldest SAELens whose format this is; its loader refuses files that name none or an older one.
_FORMAT_VERSION = "6.0.0"
_CLASSES: dict[str, tuple[type[Coder], tuple[str, ...]]] = {
    "standard": (ReLUSAE, ("b_enc",)),
    "topk": (TopKSAE, ("b_enc",)),
    "jumprelu": (JumpReLUSAE, ("b_enc", "threshold")),
    "gated": (GatedSAE, ("b_gate", "b_mag", "r_mag")),
}
ARCHITECTURES = tuple(_CLASSES)
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
_LAYER_NORM_EPSILON = 1e-5


def saelens_files(coder: Coder, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The folder's files by name, for a coder that reads activations as the model makes them (see `Coder.folded`).

    metadata: what SAELens shows beside it (`model_name`, `hook_name`, `context_size`, `prepend_bos`, ...).
    """
    exported = coder.exported()
    config = {
        "architecture": exported.architecture,
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        **exported.options,
        "dtype": "float32",
        "device": "cpu",
        # The encoder reads x, not x - b_dec; SAELens defaults to the latter.
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _FORMAT_VERSION, "sae_lens_training_version": None, **metadata},
    }
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in exported.tensors.items()}
    return {CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(), WEIGHTS_NAME: save(tensors)}


def load_saelens(folder: Path, device: torch.device, mean_norm: float = 1.0) -> Coder | NormalizedSAE:
    """The coder in a local folder, for use and not for training; a ValueError in one sentence for anything that this cannot
    run as SAELens would.

    mean_norm: mean of `||x||` over activations at the hook point, for `expected_average_only_in`.
    """
    config = read_config(folder)
    architecture = config["architecture"]
    kind, encoder = _CLASSES[architecture]
    try:
        loaded = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} cannot be read: {error}") from error
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)} | dict.fromkeys(encoder, (d_sae,))
    found = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    if found != shapes:
        wrong = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: {', '.join(wrong)} is not what a {architecture} SAE of {d_in} x {d_sae} has"
        )
    tensors = {name: tensor.double() for name, tensor in loaded.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"{folder / WEIGHTS_NAME} holds values that are not finite")
    _fold(config, tensors, mean_norm)
    # The type is given since another thread that loads a model changes the default one meanwhile.
    coder = kind.autoencoder(_settings(config), d_in).float()
    coder.load_state_dict(tensors)
    normalization = config.get("normalize_activations")
    normalized = NormalizedSAE(coder, normalization) if normalization in _PER_TOKEN else coder
    return normalized.to(device).eval().requires_grad_(False)


def _settings(config: dict[str, Any]) -> Any:
    match config["architecture"]:
        case "topk":
            return TopKSettings(d_sae=config["d_sae"], k=config["k"], rank_by="activation")
        case "jumprelu":
            return JumpReLUSettings(d_sae=config["d_sae"])
        case "gated":
            return GatedSettings(d_sae=config["d_sae"])
    return ReLUSettings(d_sae=config["d_sae"])


_PER_TOKEN = ("constant_norm_rescale", "layer_norm")


class NormalizedSAE(torch.nn.Module):
    """An SAE that normalises each token on its way in, and brings back what is written."""

    def __init__(self, coder: Coder, normalization: str) -> None:
        super().__init__()
        self.coder, self.normalization = coder, normalization
        self.W_dec, self.d_in, self.d_sae = coder.W_dec, coder.d_in, coder.d_sae

    def reconstruct(self, x: Tensor) -> tuple[Features, Tensor]:
        normalized, scale, shift = self._normalized(x)
        features, x_hat = self.coder.reconstruct(normalized)
        return features, x_hat * scale + shift

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input per token as the coder reads it, and what undoes that: `y * scale + shift`."""
        if self.normalization == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return x / scale, scale, x.new_zeros(())
        shift = x.mean(dim=-1, keepdim=True)
        # The standard deviation of a sample, and its epsilon on the way in alone: as SAELens has it.
        scale = x.std(dim=-1, keepdim=True)
        return (x - shift) / (scale + _LAYER_NORM_EPSILON), scale, shift


def read_config(folder: Path) -> dict[str, Any]:
    """`cfg.json` of a folder; a ValueError unless it describes an SAE that `load_saelens` runs."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    metadata = config.get("metadata") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(metadata, dict | None):
        raise ValueError(f"{path} is no configuration of an SAE: a mapping of fields is accepted")
    accepted: dict[str, tuple[Any, ...]] = {
        "architecture": ARCHITECTURES,
        "normalize_activations": (*NORMALIZATIONS, None),
        "reshape_activations": ("none", None),
        # of SAELens before 6
        "activation_fn": ("relu", None),
        "activation_fn_str": ("relu", None),
        "finetuning_scaling_factor": (False, None),
        "hook_head_index": (None,),
    }
    for key, values in accepted.items():
        if config.get(key) not in values:
            names = ", ".join(str(value) for value in values if value is not None) or "nothing"
            raise ValueError(f"{path}: {key} is '{config.get(key)}'; accepted is {names}")
    if (metadata or {}).get("hook_head_index") is not None:
        raise ValueError(f"{path}: it reads one attention head; SAEs of a whole hook point are accepted")
    for key in ("d_in", "d_sae", *(("k",) if config["architecture"] == "topk" else ())):
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; a whole number of at least 1 is accepted")
    if config["architecture"] == "topk" and config["k"] > config["d_sae"]:
        raise ValueError(f"{path}: k is {config['k']}, more than the {config['d_sae']} features that there are")
    return config


def content_digest(folder: Path) -> str:
    """SHA-256 over configuration and weights, which together decide what the SAE computes."""
    parts = [sha256((folder / name).read_bytes()).hexdigest() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    return sha256(" ".join(parts).encode()).hexdigest()


def _fold(config: dict[str, Any], tensors: dict[str, Tensor], mean_norm: float) -> None:
    """In place and in float64: decoder norms, input bias and scale into the weights."""
    if config.get("rescale_acts_by_decoder_norm") and config["architecture"] == "topk":
        norms = tensors["W_dec"].norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    if config.get("apply_b_dec_to_input", True):
        moved = tensors["b_dec"] @ tensors["W_enc"]
        if config["architecture"] == "gated":
            tensors["b_gate"] = tensors["b_gate"] - moved
            tensors["b_mag"] = tensors["b_mag"] - moved * tensors["r_mag"].exp()
        else:
            tensors["b_enc"] = tensors["b_enc"] - moved
    if config.get("normalize_activations") == "expected_average_only_in":
        scale = config["d_in"] ** 0.5 / mean_norm
        tensors["W_enc"] = tensors["W_enc"] * scale
        tensors["W_dec"] = tensors["W_dec"] / scale
        tensors["b_dec"] = tensors["b_dec"] / scale
