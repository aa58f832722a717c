"""Folders as the peers leave them, made here from random weights, and each peer's formula in float64 numpy.

Nothing is shared with the code under test: weights stay as the peer stores them, and features are computed as its own `encode`
does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file

D_IN, D_SAE, K = 12, 40, 5
Arrays = dict[str, np.ndarray]


def inputs() -> np.ndarray:
    """Off centre and of different norms, so that every normalisation and every bias matters."""
    random = np.random.default_rng(1)
    return (random.standard_normal((60, D_IN)) * random.uniform(0.5, 3, (60, 1)) + 0.7).astype(np.float32)


def weights(seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    shapes = {
        "W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,), "threshold": (D_SAE,),
        "b_gate": (D_SAE,), "b_mag": (D_SAE,), "r_mag": (D_SAE,),
    }  # fmt: skip
    made = {name: (0.4 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    made["threshold"] = np.abs(made["threshold"])
    return made


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0.0)


def strongest(z: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(z)
    for row, out in zip(z, kept, strict=True):
        chosen = np.argsort(-row)[:k]
        out[chosen] = relu(row[chosen])
    return kept


def double(arrays: Arrays) -> Arrays:
    return {name: value.astype(np.float64) for name, value in arrays.items()}


@dataclass
class Peer:
    """A folder of a peer's, and what its library computes: x -> features, reconstruction."""

    config: dict
    arrays: Arrays
    compute: Callable[[np.ndarray, Arrays], tuple[np.ndarray, np.ndarray]]
    write: Callable[[Path, Peer], None]
    address: str = "/somewhere/sae"
    architecture: str = ""


# SAELens


def write_saelens(folder: Path, peer: Peer) -> None:
    (folder / "cfg.json").write_text(json.dumps(peer.config))
    save_file({name: np.ascontiguousarray(value) for name, value in peer.arrays.items()}, folder / "sae_weights.safetensors")


def saelens_encoder(architecture: str, subtract: bool, rescale: bool) -> Callable:
    def compute(x: np.ndarray, w: Arrays) -> tuple[np.ndarray, np.ndarray]:
        read, norms = x - w["b_dec"] * subtract, np.linalg.norm(w["W_dec"], axis=1)
        if architecture == "gated":
            inner = read @ w["W_enc"]
            f = relu(inner * np.exp(w["r_mag"]) + w["b_mag"]) * (inner + w["b_gate"] > 0)
            return f, f @ w["W_dec"] + w["b_dec"]
        z = read @ w["W_enc"] + w["b_enc"]
        if architecture == "topk":
            f = strongest(z * norms if rescale else z, K)
            return f, (f / norms if rescale else f) @ w["W_dec"] + w["b_dec"]
        f = relu(z) * (z > w["threshold"]) if architecture == "jumprelu" else relu(z)
        return f, f @ w["W_dec"] + w["b_dec"]

    return compute


TENSORS = {
    "standard": ("b_enc",), "topk": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")
}  # fmt: skip


def saelens(architecture: str, wrap: Callable | None = None, **options) -> Peer:
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", **options}
    if architecture == "topk":
        config["k"] = K
    arrays = {name: weights()[name] for name in ("W_enc", "W_dec", "b_dec", *TENSORS[architecture])}
    subtract, rescale = options.get("apply_b_dec_to_input", True), options.get("rescale_acts_by_decoder_norm", False)
    compute = saelens_encoder(architecture, subtract, rescale)
    return Peer(config, arrays, wrap(compute) if wrap else compute, write_saelens, architecture=architecture)


def layer_norm(inner: Callable) -> Callable:
    def compute(x: np.ndarray, w: Arrays) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
        f, y = inner((x - mean) / (deviation + 1e-5), w)
        return f, y * deviation + mean

    return compute


def constant_norm(inner: Callable) -> Callable:
    def compute(x: np.ndarray, w: Arrays) -> tuple[np.ndarray, np.ndarray]:
        scale = np.sqrt(D_IN) / np.linalg.norm(x, axis=1, keepdims=True)
        f, y = inner(x * scale, w)
        return f, y / scale

    return compute


MEAN_NORM = 4.5


def average(inner: Callable) -> Callable:
    def compute(x: np.ndarray, w: Arrays) -> tuple[np.ndarray, np.ndarray]:
        scale = np.sqrt(D_IN) / MEAN_NORM
        f, y = inner(x * scale, w)
        return f, y / scale

    return compute


def centred(inner: Callable) -> Callable:
    """The model whose weights are centred makes x less its mean; what is spliced back gets it again."""

    def compute(x: np.ndarray, w: Arrays) -> tuple[np.ndarray, np.ndarray]:
        mean = x.mean(axis=1, keepdims=True)
        f, y = inner(x - mean, w)
        return f, y + mean

    return compute


def rounded(inner: Callable) -> Callable:
    def compute(x: np.ndarray, w: Arrays) -> tuple[np.ndarray, np.ndarray]:
        return inner(x, {name: torch.tensor(value).bfloat16().double().numpy() for name, value in w.items()})

    return compute


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


# sparsify


def write_sparsify(folder: Path, peer: Peer) -> None:
    (folder / "cfg.json").write_text(json.dumps(peer.config))
    save_file({name: np.ascontiguousarray(value) for name, value in peer.arrays.items()}, folder / "sae.safetensors")


def sparsify(**options) -> Peer:
    w = weights(2)
    arrays = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}

    transcodes, skips = options.get("transcode"), options.get("skip_connection")
    if skips:
        arrays["W_skip"] = np.random.default_rng(9).standard_normal((D_IN, D_IN)).astype(np.float32)

    def compute(x: np.ndarray, a: Arrays) -> tuple[np.ndarray, np.ndarray]:
        f = strongest(relu((x if transcodes else x - a["b_dec"]) @ a["encoder.weight"].T + a["encoder.bias"]), K)
        return f, f @ a["W_dec"] + a["b_dec"] + (x @ a["W_skip"].T if skips else 0)

    name = ("topk_skip_transcoder" if skips else "topk_transcoder") if transcodes else "topk"
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": K, "normalize_decoder": True,
              "multi_topk": True, "skip_connection": False, "transcode": False, "d_in": D_IN, **options}  # fmt: skip
    return Peer(config, arrays, compute, write_sparsify, "/runs/pythia/layers.3", name)


def write_circuit_tracer(folder: Path, peer: Peer) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(peer.config))
    save_file({name: np.ascontiguousarray(value) for name, value in peer.arrays.items()}, folder / "layer_4.safetensors")


def circuit_tracer(architecture: str, **options) -> Peer:
    w = weights(5)
    arrays = {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if "skip" in architecture:
        arrays["W_skip"] = np.random.default_rng(9).standard_normal((D_IN, D_IN)).astype(np.float32)
    if "jumprelu" in architecture:
        arrays["activation_function.threshold"] = w["threshold"]

    def compute(x: np.ndarray, a: Arrays) -> tuple[np.ndarray, np.ndarray]:
        before = x @ a["W_enc"].T + a["b_enc"]
        f = strongest(relu(before), K) if "topk" in architecture else relu(before)
        if "jumprelu" in architecture:
            f = f * (before > a["activation_function.threshold"])
        return f, f @ a["W_dec"] + a["b_dec"] + (x @ a["W_skip"].T if "skip" in architecture else 0)

    config = {"model_name": "google/gemma-2-2b", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
              "feature_output_hook": "hook_mlp_out", "scan": "gemma", **options}  # fmt: skip
    return Peer(config, arrays, compute, write_circuit_tracer, "/sets/gemma/layer_4.safetensors", architecture)


# dictionary_learning


def write_dictionary(folder: Path, peer: Peer) -> None:
    (folder / "config.json").write_text(json.dumps(peer.config))
    state = {name: torch.from_numpy(np.array(value)) for name, value in peer.arrays.items()}
    torch.save(state, folder / "ae.pt")


def dictionary(dict_class: str, **options) -> Peer:
    w = weights(3)
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    unset = {"k": np.int32(K), "threshold": np.float32(0.6)}
    arrays, architecture = {
        "AutoEncoder": ({**linear, "bias": w["b_dec"]}, "standard"),
        "AutoEncoderNew": ({**linear, "decoder.bias": w["b_dec"]}, "standard"),
        "GatedAutoEncoder": (
            {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "decoder_bias": w["b_dec"],
             "r_mag": w["r_mag"], "gate_bias": w["b_gate"], "mag_bias": w["b_mag"]}, "gated"),
        "JumpReluAutoEncoder": ({name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}, "jumprelu"),
        "AutoEncoderTopK": ({**linear, "b_dec": w["b_dec"], **unset}, "topk"),
        "BatchTopKSAE": ({**linear, "b_dec": w["b_dec"], **unset}, "jumprelu"),
        "MatryoshkaBatchTopKSAE": (
            {**{name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}, **unset,
             "group_sizes": np.array([10, 30])}, "jumprelu"),
    }[dict_class]  # fmt: skip

    def compute(x: np.ndarray, a: Arrays) -> tuple[np.ndarray, np.ndarray]:
        if dict_class in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
            read = x if dict_class == "JumpReluAutoEncoder" else x - a["b_dec"]
            z = read @ a["W_enc"] + a["b_enc"]
            f = relu(z * (z > a["threshold"]))
            return f, f @ a["W_dec"] + a["b_dec"]
        bias = next(a[name] for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in a)
        z = (x if dict_class == "AutoEncoderNew" else x - bias) @ a["encoder.weight"].T
        if dict_class == "GatedAutoEncoder":
            f = (z + a["gate_bias"] > 0) * relu(np.exp(a["r_mag"]) * z + a["mag_bias"])
        else:
            f = relu(z + a["encoder.bias"])
        if dict_class == "AutoEncoderTopK":
            f = strongest(f, K)
        elif dict_class == "BatchTopKSAE":
            f = f * (f > a["threshold"])
        return f, f @ a["decoder.weight"].T + bias

    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "k": K,
               "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3", **options}  # fmt: skip
    return Peer({"trainer": trainer, "buffer": {"ctx_len": 128}}, arrays, compute, write_dictionary, architecture=architecture)


# Gemma Scope


def write_npz(folder: Path, peer: Peer) -> None:
    np.savez(folder / "params.npz", **peer.arrays)


def write_gemma(folder: Path, peer: Peer) -> None:
    (folder / "config.json").write_text(json.dumps(peer.config))
    save_file({name: np.ascontiguousarray(value) for name, value in peer.arrays.items()}, folder / "params.safetensors")


GEMMA = "/hub/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


def gemma_scope(second: bool = False, lower: bool = False, transcodes: bool = False, **options) -> Peer:
    names = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]
    made = {name: weights(4)[name] for name in names}
    if options.get("affine_connection"):
        made["affine_skip_connection"] = weights(5)["W_enc"][:, :D_IN]
    if transcodes:
        norms = {"in": "pre_feedforward_layernorm", "out": "post_feedforward_layernorm"}
        options |= {f"hf_hook_point_{way}": f"model.layers.5.{norm}.output" for way, norm in norms.items()}
    arrays = {name.lower() if lower else name: value for name, value in made.items()}

    def compute(x: np.ndarray, a: Arrays) -> tuple[np.ndarray, np.ndarray]:
        a = {name.replace("w_", "W_"): value for name, value in a.items()}
        z = x @ a["W_enc"] + a["b_enc"]
        f = (z > a["threshold"]) * relu(z)
        y = f @ a["W_dec"] + a["b_dec"]
        return f, y + x @ a["affine_skip_connection"] if "affine_skip_connection" in a else y

    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.5.output",
              **options}  # fmt: skip
    skip = "skip_" * bool(options.get("affine_connection"))
    kind = f"jumprelu_{skip}transcoder" if transcodes else "jumprelu"
    return Peer(config, arrays, compute, write_gemma if second else write_npz, GEMMA, kind)


def in_folder(peer: Peer, tmp_path: Path) -> Path:
    folder = tmp_path / "sae"
    folder.mkdir()
    peer.write(folder, peer)
    return folder
