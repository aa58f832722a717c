"""SAEs that others made: folders in the format of SAELens 6 (`cfg.json`, `sae_weights.safetensors`).

Whatever can be folded into the weights is folded when it is loaded, so that every SAE here reads
`pre = norm(x) W_enc + b_enc` and writes `x_hat = unnorm(f W_dec + b_dec)`:

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
from safetensors.torch import load_file
from torch import Tensor, nn

from components.sae.artifact import CONFIG_NAME, WEIGHTS_NAME

_ENCODER = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
ARCHITECTURES = tuple(_ENCODER)
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
_LAYER_NORM_EPSILON = 1e-5


class SAELensSAE(nn.Module):
    """Encoder and decoder of one of `ARCHITECTURES`, weights in float32.

    W_enc `[d_in, d_sae]`, W_dec `[d_sae, d_in]`, b_dec `[d_in]`; every other tensor `[d_sae]`.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_enc: Tensor
    threshold: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def __init__(self, architecture: str, tensors: dict[str, Tensor], normalization: str = "none", k: int = 0) -> None:
        """k: active features per token, of `topk` alone."""
        super().__init__()
        self.architecture, self.normalization, self.k = architecture, normalization, k
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """Activations `[..., d_in]` -> features `[..., d_sae]`."""
        return self._features(self._normalized(x)[0])

    def decode(self, features: Tensor) -> Tensor:
        """Features `[..., d_sae]` -> `[..., d_in]`, in units of the normalised input where there is a normalisation."""
        return features @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the reconstruction in units of `x`."""
        normalized, scale, shift = self._normalized(x)
        features = self._features(normalized)
        return features, self.decode(features) * scale + shift

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input per token as the SAE reads it, and what undoes that: `y * scale + shift`."""
        one, nothing = x.new_ones(()), x.new_zeros(())
        if self.normalization == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return x / scale, scale, nothing
        if self.normalization == "layer_norm":
            shift = x.mean(dim=-1, keepdim=True)
            # The standard deviation of a sample, and its epsilon on the way in alone: as SAELens has it.
            scale = x.std(dim=-1, keepdim=True)
            return (x - shift) / (scale + _LAYER_NORM_EPSILON), scale, shift
        return x, one, nothing

    def _features(self, x: Tensor) -> Tensor:
        if self.architecture == "gated":
            product = x @ self.W_enc
            return (product + self.b_gate > 0) * torch.relu(product * self.r_mag.exp() + self.b_mag)
        before = x @ self.W_enc + self.b_enc
        if self.architecture == "topk":
            kept = before.topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter(-1, kept.indices, torch.relu(kept.values))
        if self.architecture == "jumprelu":
            return torch.relu(before) * (before > self.threshold)
        return torch.relu(before)


def load_saelens(folder: Path, device: torch.device, mean_norm: float) -> SAELensSAE:
    """The SAE in a local folder; a ValueError in one sentence for anything that this cannot run as SAELens would.

    mean_norm: mean of `||x||` over activations at the hook point, for `expected_average_only_in`.
    """
    config = read_config(folder)
    architecture = config["architecture"]
    try:
        loaded = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} cannot be read: {error}") from error
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(_ENCODER[architecture], (d_sae,))
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
    kept = {name: tensor.float().to(device) for name, tensor in tensors.items()}
    normalization = config.get("normalize_activations") or "none"
    folded = "none" if normalization == "expected_average_only_in" else normalization
    k = int(config["k"]) if architecture == "topk" else 0
    return SAELensSAE(architecture, kept, folded, k).eval()


def read_config(folder: Path) -> dict[str, Any]:
    """`cfg.json` of a folder; a ValueError unless it describes an SAE that `load_saelens` runs."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
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
    if (config.get("metadata") or {}).get("hook_head_index") is not None:
        raise ValueError(f"{path}: it reads one attention head; SAEs of a whole hook point are accepted")
    for key in ("d_in", "d_sae", *(("k",) if config["architecture"] == "topk" else ())):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; a whole number of at least 1 is accepted")
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
