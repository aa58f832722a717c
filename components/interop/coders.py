"""From the tensors of a peer to a coder of ours.

Every format is first put into SAELens' terms: fields of its `cfg.json`, and tensors under its names. Whatever can be folded
into the weights is folded here, so that a coder reads `pre = norm(x) W_enc + b_enc` and writes `unnorm(f W_dec + b_dec)`:

- `apply_b_dec_to_input`: `(x - b_dec) W_enc + b = x W_enc + (b - b_dec W_enc)`;
- `rescale_acts_by_decoder_norm` of TopK: norms move from the decoder into the encoder;
- `expected_average_only_in`: the scalar `sqrt(d_in) / mean ||x||`, as SAELens itself folds it after training.

A mean that TransformerLens' `center_writing_weights` takes away from every token is no matter of weights: see `NormalizedSAE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from components.interop.names import READS, Kind, columns_of
from components.sae.architectures.gated import GatedSAE, GatedSettings
from components.sae.architectures.jumprelu import JumpReLUSAE, JumpReLUSettings
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.architectures.topk import TopKSAE, TopKSettings
from components.sae.coder import Coder
from components.sae.features import Features

_CLASSES: dict[str, tuple[type[Coder], tuple[str, ...]]] = {
    "standard": (ReLUSAE, ("b_enc",)),
    "topk": (TopKSAE, ("b_enc",)),
    "jumprelu": (JumpReLUSAE, ("b_enc", "threshold")),
    "gated": (GatedSAE, ("b_gate", "b_mag", "r_mag")),
}
_PER_TOKEN = ("constant_norm_rescale", "layer_norm")
NORMALIZATIONS = ("none", "expected_average_only_in", *_PER_TOKEN)
_LAYER_NORM_EPSILON = 1e-5


class NormalizedSAE(torch.nn.Module):
    """An SAE that normalises each token on its way in, and brings back what is written."""

    def __init__(self, coder: Coder, normalization: str, centred: bool) -> None:
        """normalization: as SAELens has it. centred: it reads the residual stream less each token's mean over dimensions, which
        is all that centring every weight that writes to the stream does to it."""
        super().__init__()
        self.coder, self.normalization, self.centred = coder, normalization, centred
        self.W_dec, self.d_in, self.d_sae = coder.W_dec, coder.d_in, coder.d_sae

    def encode(self, x: Tensor) -> Features:
        return self.coder.encode(self._normalized(x)[0])

    def reconstruct(self, x: Tensor) -> tuple[Features, Tensor]:
        normalized, scale, shift = self._normalized(x)
        features, x_hat = self.coder.reconstruct(normalized)
        return features, x_hat * scale + shift

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input per token as the coder reads it, and what undoes that: `y * scale + shift`."""
        mean = x.mean(dim=-1, keepdim=True)
        if self.normalization == "layer_norm":
            # The standard deviation of a sample, and its epsilon on the way in alone: as SAELens has it.
            scale = x.std(dim=-1, keepdim=True)
            return (x - mean) / (scale + _LAYER_NORM_EPSILON), scale, mean
        shift = mean if self.centred else torch.zeros_like(mean)
        scale = torch.ones_like(mean)
        if self.normalization == "constant_norm_rescale":
            scale = (x - shift).norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return (x - shift) / scale, scale, shift


AnySAE = Coder | NormalizedSAE


def coder_of(config: dict[str, Any], tensors: Mapping[str, Tensor], device: torch.device, mean_norm: float | None) -> AnySAE:
    """The coder that `config` describes, for use and not for training; a ValueError for tensors that are not its own.

    mean_norm: mean of `||x||` over activations at the hook point, for `expected_average_only_in`.
    """
    what = Kind.parse(config["architecture"])
    assert what is not None
    reads, writes = columns_of(config)
    d_in, d_out = (sum(column.width for column in columns) for columns in (reads, writes))
    kind, encoder = _CLASSES[what.reads]
    d_sae = config["d_sae"]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(encoder, (d_sae,))
    if what.skip:
        shapes["W_skip"] = (d_out, d_in)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        wrong = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise ValueError(f"{', '.join(wrong)} is not what a {what} {'SAE ' * (not what.writes)}of {d_in} x {d_sae} has")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError("the weights hold values that are not finite")
    folded = _folded(config, {name: tensor.double() for name, tensor in tensors.items()}, mean_norm)
    # The type is given since another thread that loads a model changes the default one meanwhile.
    coder = kind(_settings(config, what), reads, writes, d_sae).float()
    coder.load_state_dict(folded)
    normalization, centred = config.get("normalize_activations") or "none", is_centred(config)
    per_token = normalization in _PER_TOKEN or centred
    result = NormalizedSAE(coder, normalization, centred) if per_token else coder
    return result.to(device).eval().requires_grad_(False)


def is_centred(config: dict[str, Any]) -> bool:
    """Whether it was trained on a model whose writing weights TransformerLens had centred."""
    return bool(model_options(config).get("center_writing_weights"))


def model_options(config: dict[str, Any]) -> dict[str, Any]:
    """With what the model was loaded that it was trained on."""
    return (config.get("metadata") or {}).get("model_from_pretrained_kwargs") or {}


def _settings(config: dict[str, Any], what: Kind) -> Any:
    size: dict[str, Any] = {"d_sae": config["d_sae"], "skip": what.skip}
    match what.reads:
        case "topk":
            return TopKSettings(k=config["k"], rank_by="activation", **size)
        case "jumprelu":
            return JumpReLUSettings(**size)
        case "gated":
            return GatedSettings(**size)
    return ReLUSettings(**size)


def _folded(config: dict[str, Any], tensors: dict[str, Tensor], mean_norm: float | None) -> dict[str, Tensor]:
    """In float64: decoder norms, input bias and scale into the weights."""
    if config.get("rescale_acts_by_decoder_norm") and config["architecture"] == "topk":
        norms = tensors["W_dec"].norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    if config.get("apply_b_dec_to_input", config["architecture"] in READS):
        moved = tensors["b_dec"] @ tensors["W_enc"]
        if config["architecture"] == "gated":
            tensors["b_gate"] = tensors["b_gate"] - moved
            tensors["b_mag"] = tensors["b_mag"] - moved * tensors["r_mag"].exp()
        else:
            tensors["b_enc"] = tensors["b_enc"] - moved
    if config.get("normalize_activations") == "expected_average_only_in":
        if is_centred(config):
            raise ValueError(
                "normalize_activations is 'expected_average_only_in' and center_writing_weights true: one is accepted"
            )
        if mean_norm is None:
            raise ValueError(
                "normalize_activations is 'expected_average_only_in', a mean that only `sae evaluate` and `sae import` measure"
            )
        scale = config["d_in"] ** 0.5 / mean_norm
        tensors["W_enc"] = tensors["W_enc"] * scale
        tensors["W_dec"] = tensors["W_dec"] / scale
        tensors["b_dec"] = tensors["b_dec"] / scale
    return tensors


# What the readers of the formats share.


def read_mapping(path: Path) -> dict[str, Any]:
    """A configuration in JSON."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no configuration of an SAE: a mapping of fields is accepted")
    return found


def require_values(path: Path, fields: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in accepted.items():
        if fields.get(key) not in values:
            names = ", ".join(str(value) for value in values if value is not None) or "nothing"
            raise ValueError(f"{path}: {key} is '{fields.get(key)}'; accepted is {names}")


def require_sizes(path: Path, fields: Mapping[str, Any], *names: str) -> None:
    for key in names:
        if type(fields.get(key)) is not int or fields[key] < 1:
            raise ValueError(f"{path}: {key} is {fields.get(key)!r}; a whole number of at least 1 is accepted")


def require_k(path: Path, k: int, d_sae: int) -> None:
    if k > d_sae:
        raise ValueError(f"{path}: k is {k}, more than the {d_sae} features that there are")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Under SAELens' names; `.T` behind one says that the peer has the transpose. A name that is not known stays."""
    result = {}
    for name, tensor in tensors.items():
        ours = names.get(name, name)
        if ours.endswith(".T") and tensor.ndim == 2:
            ours, tensor = ours.removesuffix(".T"), tensor.T
        result[ours] = tensor
    return result
