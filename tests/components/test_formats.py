"""Peers' files, made here from random weights, against each peer's formula in float64 numpy; and what is refused of them.

The formulas share nothing with the code under test: weights stay as the peer stores them, and features are computed as its own
`encode` does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from components.interop.formats import FORMATS, given_sae
from components.interop.saelens import saelens_files
from components.interop.sparsify import sparsify_files

CPU = torch.device("cpu")
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

    def compute(x: np.ndarray, a: Arrays) -> tuple[np.ndarray, np.ndarray]:
        f = strongest(relu((x - a["b_dec"]) @ a["encoder.weight"].T + a["encoder.bias"]), K)
        return f, f @ a["W_dec"] + a["b_dec"]

    config = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": K, "normalize_decoder": True,
              "multi_topk": True, "skip_connection": False, "transcode": False, "d_in": D_IN, **options}  # fmt: skip
    return Peer(config, arrays, compute, write_sparsify, "/runs/pythia/layers.3", "topk")


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


def gemma_scope(second: bool = False, lower: bool = False, **options) -> Peer:
    made = {name: weights(4)[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    arrays = {name.lower() if lower else name: value for name, value in made.items()}

    def compute(x: np.ndarray, a: Arrays) -> tuple[np.ndarray, np.ndarray]:
        a = {name.replace("w_", "W_"): value for name, value in a.items()}
        z = x @ a["W_enc"] + a["b_enc"]
        f = (z > a["threshold"]) * relu(z)
        return f, f @ a["W_dec"] + a["b_dec"]

    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.5.output",
              **options}  # fmt: skip
    return Peer(config, arrays, compute, write_gemma if second else write_npz, GEMMA, "jumprelu")


EXACT = {
    **{f"saelens {name}": saelens(name) for name in TENSORS},
    **{f"saelens {name} reads x": saelens(name, apply_b_dec_to_input=False) for name in TENSORS},
    **{f"saelens {name} layer norm": saelens(name, layer_norm, normalize_activations="layer_norm") for name in TENSORS},
    **{
        f"saelens {name} norm": saelens(name, constant_norm, normalize_activations="constant_norm_rescale") for name in TENSORS
    },
    **{
        f"saelens {name} mean norm": saelens(name, average, normalize_activations="expected_average_only_in")
        for name in TENSORS
    },
    "saelens topk by length": saelens("topk", rescale_acts_by_decoder_norm=True),
    "saelens centred": saelens("jumprelu", centred, metadata=CENTRED),
    "saelens centred, norm": saelens(
        "standard", lambda f: centred(constant_norm(f)), metadata=CENTRED, normalize_activations="constant_norm_rescale"
    ),
    "saelens centred, layer norm": saelens(
        "standard", lambda f: centred(layer_norm(f)), metadata=CENTRED, normalize_activations="layer_norm"
    ),
    "saelens bfloat16": saelens("standard", rounded, dtype="torch.bfloat16"),
    "sparsify": sparsify(),
    "sparsify by factor": sparsify(num_latents=0, d_in=D_IN, expansion_factor=2),
    **{
        name: dictionary(name)
        for name in (
            "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
        )
    },
    "gemma scope": gemma_scope(),
    "gemma scope, lower case": gemma_scope(lower=True),
    "gemma scope 2": gemma_scope(second=True, lower=True),
}  # fmt: skip
EXACT["sparsify by factor"].arrays = {
    name: value[: 2 * D_IN] if name != "b_dec" else value for name, value in EXACT["sparsify"].arrays.items()
}


def in_folder(peer: Peer, tmp_path: Path) -> Path:
    folder = tmp_path / "sae"
    folder.mkdir()
    peer.write(folder, peer)
    return folder


@pytest.mark.parametrize("name", EXACT)
def test_a_peers_sae_computes_here_what_its_formula_says(name: str, tmp_path: Path):
    peer, x = EXACT[name], inputs()
    given = given_sae(in_folder(peer, tmp_path), peer.address)
    assert given.config["architecture"] == peer.architecture
    encoded, y = given.load(CPU, MEAN_NORM).reconstruct(torch.tensor(x))
    features, reconstruction = peer.compute(x.astype(np.float64), double(peer.arrays))
    assert 0.02 < (features > 0).mean() < 0.9
    np.testing.assert_allclose(encoded.dense().numpy(), features, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y.numpy(), reconstruction, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spoiled", ["encoder.weight", "W_dec"])
def test_a_square_matrix_the_wrong_way_round_would_be_noticed(spoiled: str, tmp_path: Path):
    """Shapes cannot tell where `d_sae` is `d_in`: the comparison with the formula does."""
    peer, x = sparsify(num_latents=D_IN), inputs()
    peer.arrays = {
        name: value if name == "b_dec" else np.ascontiguousarray(value[:D_IN]) for name, value in peer.arrays.items()
    }
    reconstruction = peer.compute(x.astype(np.float64), double(peer.arrays))[1]
    right = given_sae(in_folder(peer, tmp_path), peer.address).load(CPU).reconstruct(torch.tensor(x))[1]
    np.testing.assert_allclose(right.numpy(), reconstruction, rtol=1e-5, atol=1e-5)
    peer.arrays[spoiled] = peer.arrays[spoiled].T
    peer.write(tmp_path / "sae", peer)
    wrong = given_sae(tmp_path / "sae", peer.address).load(CPU).reconstruct(torch.tensor(x))[1]
    assert np.abs(wrong.numpy() - reconstruction).max() > 0.1


@pytest.mark.parametrize("name", [name for name in EXACT if "mean norm" not in name])
def test_what_was_read_is_written_as_saelens_and_read_again(name: str, tmp_path: Path):
    peer, x = EXACT[name], torch.tensor(inputs())
    given = given_sae(in_folder(peer, tmp_path), peer.address)
    (tmp_path / "again").mkdir()
    for file, content in saelens_files(given.load(CPU), given.metadata).items():
        (tmp_path / "again" / file).write_bytes(content)
    again = given_sae(tmp_path / "again", "again").load(CPU)
    first, second = given.load(CPU).reconstruct(x), again.reconstruct(x)
    assert torch.equal(first[0].dense(), second[0].dense())
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", ["saelens topk", "saelens topk by length", "sparsify", "AutoEncoderTopK"])
def test_what_is_written_as_sparsify_follows_its_formula(name: str, tmp_path: Path):
    from safetensors.numpy import load_file

    peer, x = EXACT[name], inputs()
    given = given_sae(in_folder(peer, tmp_path), peer.address)
    (tmp_path / "again").mkdir()
    for file, content in sparsify_files(given.load(CPU), {"hook_name": "resid_post.3"}).items():
        (tmp_path / "again" / file).write_bytes(content)
    arrays = load_file(tmp_path / "again" / "sae.safetensors")
    assert {file: value.shape for file, value in arrays.items()} == {
        "encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)
    }  # fmt: skip
    features, reconstruction = sparsify().compute(x.astype(np.float64), double(arrays))
    expected_features, expected = peer.compute(x.astype(np.float64), double(peer.arrays))
    np.testing.assert_allclose(reconstruction, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features, expected_features, rtol=1e-5, atol=1e-5)
    again = given_sae(tmp_path / "again", "again")
    assert again.metadata == {"hook_name": "resid_post.3"}
    np.testing.assert_allclose(again.load(CPU).reconstruct(torch.tensor(x))[1].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["saelens standard", "saelens jumprelu", "saelens gated", "saelens topk layer norm"])
def test_what_sparsify_has_no_form_for_is_refused(name: str, tmp_path: Path):
    given = given_sae(in_folder(EXACT[name], tmp_path), "sae")
    with pytest.raises(ValueError, match=r"sparsify has no .*; accepted for .* saelens"):
        sparsify_files(given.load(CPU), {})


@pytest.mark.parametrize(
    ("peer", "metadata"),
    [
        (sparsify(), {"hook_name": "layers.3"}),
        (dictionary("AutoEncoder"), {"hook_name": "resid_post.3", "model_name": "EleutherAI/pythia-70m"}),
        (dictionary("AutoEncoder", submodule_name=None), {"model_name": "EleutherAI/pythia-70m"}),
        (gemma_scope(), {"hook_name": "resid_post.20", "model_name": "google/gemma-2-2b"}),
        (gemma_scope(second=True), {"hook_name": "model.layers.5", "model_name": "gemma-3-270m"}),
        (
            gemma_scope(second=True, hf_hook_point_in="model.layers.5.post_feedforward_layernorm.output"),
            {"hook_name": "mlp_out.5", "model_name": "gemma-3-270m"},
        ),
        (
            gemma_scope(second=True, hf_hook_point_in="model.layers.5.self_attn.o_proj.input"),
            {"hook_name": "model.layers.5.self_attn.o_proj:in", "model_name": "gemma-3-270m"},
        ),
    ],
)
def test_model_and_hook_point_are_found_where_the_format_has_them(peer: Peer, metadata: dict, tmp_path: Path):
    assert given_sae(in_folder(peer, tmp_path), peer.address).metadata == metadata


# What is refused.


def edit(name: str, **fields) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        inner = config.get("trainer", config)
        inner.update(fields)
        (folder / name).write_text(json.dumps(config))

    return spoil


def tensors(name: str, **changes) -> Callable[[Path], None]:
    """Other tensors in a file of safetensors; None takes one away."""

    def spoil(folder: Path) -> None:
        from safetensors.numpy import load_file

        arrays = {**load_file(folder / name), **changes}
        save_file({key: value for key, value in arrays.items() if value is not None}, folder / name)

    return spoil


def state(**changes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = {**torch.load(folder / "ae.pt", weights_only=True), **changes}
        torch.save({key: value for key, value in found.items() if value is not None}, folder / "ae.pt")

    return spoil


def files(**contents: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return spoil


def only(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).write_bytes(b"")

    return spoil


class Runs:
    """What a pickle would run."""

    def __reduce__(self) -> tuple:
        return (Path("ran").touch, ())


def pickled(folder: Path) -> None:
    torch.save({"encoder.weight": Runs()}, folder / "ae.pt")


def pickled_npz(folder: Path) -> None:
    np.savez(folder / "params.npz", **{**gemma_scope().arrays, "b_enc": np.array([Runs()], dtype=object)})


def cut(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


NAN = np.full(D_IN, np.nan, np.float32)
BACKUP = {"step": 3, "ae": {}, "optimizer": {}, "config": {}, "norm_factor": 2.0}
REFUSED: dict[str, tuple[Peer, Callable[[Path], None], list[str]]] = {
    "saelens transcoder": (saelens("standard"), edit("cfg.json", architecture="transcoder"), ["transcoder", "only SAEs"]),
    "saelens skip transcoder": (saelens("standard"), edit("cfg.json", architecture="skip_transcoder"), ["skip_transcoder"]),
    "saelens abstopk": (saelens("topk"), edit("cfg.json", architecture="abstopk"), ["abstopk", "topk"]),
    "saelens temporal": (saelens("standard"), edit("cfg.json", architecture="temporal"), ["temporal", "jumprelu"]),
    "saelens whitening": (
        saelens("standard"), edit("cfg.json", normalize_activations="covariance_whitening"), ["covariance_whitening"]),
    "saelens heads": (saelens("standard"), edit("cfg.json", reshape_activations="hook_z"), ["reshape_activations", "hook_z"]),
    "saelens dtype": (saelens("standard"), edit("cfg.json", dtype="float8"), ["dtype", "float8", "bfloat16"]),
    "saelens bias": (saelens("standard"), edit("cfg.json", apply_b_dec_to_input="no"), ["apply_b_dec_to_input", "True, False"]),
    "saelens metadata": (saelens("standard"), edit("cfg.json", metadata=[1]), ["cfg.json"]),
    "saelens options": (
        saelens("standard"), edit("cfg.json", metadata={"model_from_pretrained_kwargs": 3}), ["cfg.json", "mapping"]),
    "saelens centred by mean norm": (
        saelens("standard"), edit("cfg.json", metadata=CENTRED, normalize_activations="expected_average_only_in"),
        ["expected_average_only_in", "center_writing_weights"]),
    "saelens k": (saelens("topk"), edit("cfg.json", k=D_SAE + 1), ["k is 41", "40"]),
    "saelens scaling factor": (
        saelens("standard"), tensors("sae_weights.safetensors", scaling_factor=np.full(D_SAE, 2, np.float32)),
        ["scaling_factor"]),
    "saelens extra tensor": (
        saelens("standard"), tensors("sae_weights.safetensors", W_skip=np.eye(D_IN, dtype=np.float32)), ["W_skip"]),
    "saelens nan": (saelens("standard"), tensors("sae_weights.safetensors", b_dec=NAN), ["not finite"]),
    "saelens cut": (saelens("standard"), cut("sae_weights.safetensors"), ["cannot be read"]),
    "saelens transposed": (
        saelens("standard"), tensors("sae_weights.safetensors", W_dec=np.ones((D_IN, D_SAE), np.float32)), ["W_dec"]),
    "sparsify transcoder": (sparsify(), edit("cfg.json", transcode=True), ["transcode", "True", "False"]),
    "sparsify skip": (sparsify(), edit("cfg.json", skip_connection=True), ["skip_connection"]),
    "sparsify skip tensor": (sparsify(), tensors("sae.safetensors", W_skip=np.eye(D_IN, dtype=np.float32)), ["W_skip"]),
    "sparsify groupmax": (sparsify(), edit("cfg.json", activation="groupmax"), ["activation", "groupmax", "topk"]),
    "sparsify signed": (sparsify(), edit("cfg.json", signed=True), ["signed"]),
    "sparsify no decoder": (sparsify(), tensors("sae.safetensors", W_dec=None), ["W_dec"]),
    "sparsify no width": (sparsify(), edit("cfg.json", d_in=None), ["d_in", "whole number"]),
    "sparsify k": (sparsify(), edit("cfg.json", k=D_SAE + 1), ["k is 41"]),
    "sparsify cut": (sparsify(), cut("sae.safetensors"), ["cannot be read"]),
    "sparsify broken": (sparsify(), files(cfg__json=b"{"), ["cfg.json", "cannot be read"]),
    "dictionary class": (dictionary("AutoEncoder"), edit("config.json", dict_class="IdentityDict"), ["IdentityDict", "TopK"]),
    "dictionary no trainer": (dictionary("AutoEncoder"), files(config__json=b"{}"), ["trainer"]),
    "dictionary list": (dictionary("AutoEncoder"), files(config__json=b"[]"), ["config.json", "mapping"]),
    "dictionary other class": (dictionary("AutoEncoder"), edit("config.json", dict_class="AutoEncoderNew"), ["b_dec", "bias"]),
    "dictionary k": (dictionary("AutoEncoderTopK"), edit("config.json", k=K + 1), ["k is 5", "6"]),
    "dictionary threshold": (
        dictionary("BatchTopKSAE"), state(threshold=torch.tensor(-1.0)), ["threshold is -1"]),
    "dictionary no threshold": (dictionary("BatchTopKSAE"), state(threshold=None), ["threshold"]),
    "dictionary backup": (dictionary("AutoEncoder"), lambda folder: torch.save(BACKUP, folder / "ae.pt"), ["backup"]),
    "dictionary of others": (dictionary("AutoEncoder"), lambda folder: torch.save([1], folder / "ae.pt"), ["tensors by name"]),
    "dictionary pickle": (dictionary("AutoEncoder"), pickled, ["cannot be read as tensors"]),
    "dictionary cut": (dictionary("AutoEncoder"), cut("ae.pt"), ["cannot be read as tensors"]),
    "dictionary empty": (dictionary("AutoEncoder"), files(ae__pt=b""), ["cannot be read as tensors"]),
    "gemma cut": (gemma_scope(), cut("params.npz"), ["params.npz", "cannot be read"]),
    "gemma pickle": (gemma_scope(), pickled_npz, ["cannot be read"]),
    "gemma no bias": (
        gemma_scope(), lambda folder: np.savez(folder / "params.npz", W_enc=weights()["W_enc"]), ["cannot be read", "b_dec"]),
    "gemma array alone": (
        gemma_scope(), lambda folder: np.save((folder / "params.npz").open("wb"), np.ones(3)), ["cannot be read"]),
    "gemma 2 transcoder": (
        gemma_scope(second=True), edit("config.json", hf_hook_point_out="model.layers.5.mlp.output"), ["only SAEs"]),
    "gemma 2 affine": (gemma_scope(second=True), edit("config.json", affine_connection=True), ["affine_connection"]),
    "gemma 2 architecture": (gemma_scope(second=True), edit("config.json", architecture="topk"), ["jump_relu"]),
    "gemma 2 cross-layer": (
        gemma_scope(second=True), tensors("params.safetensors", W_dec=np.ones((D_SAE, 2, D_IN), np.float32)), ["W_dec"]),
    "gemma 2 cut": (gemma_scope(second=True), cut("params.safetensors"), ["cannot be read"]),
    "circuit-tracer": (saelens("standard"), only("config.yaml", "layer_0.safetensors"), ["circuit-tracer", "only SAEs"]),
    "cross-layer": (saelens("standard"), only("W_enc_0.safetensors", "W_dec_0.safetensors"), ["circuit-tracer"]),
    "nothing": (saelens("standard"), only("README.md"), ["no SAE", "cfg.json and sae.safetensors (sparsify)", "params.npz"]),
    "two": (
        saelens("standard"), only("cfg.json", "sae.safetensors", "sae_weights.safetensors"), ["files of SAELens and sparsify"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_damaged_or_has_another_meaning_is_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    peer, spoil, parts = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    folder = in_folder(peer, tmp_path)
    spoil(folder)
    with pytest.raises(ValueError, match=" ") as caught:
        given_sae(folder, peer.address).load(CPU, MEAN_NORM)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence
    assert not Path("ran").exists()


@pytest.mark.parametrize("part", ["transcoder", "embedding"])
def test_gemma_scopes_other_dictionaries_are_known_by_their_address(part: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"'{part}'.*res, mlp and att"):
        given_sae(in_folder(gemma_scope(), tmp_path), f"/hub/gemma-scope-2b-pt-{part}s/layer_1")


def test_a_mean_norm_that_nobody_measured_is_not_taken_for_one(tmp_path: Path):
    given = given_sae(in_folder(EXACT["saelens standard mean norm"], tmp_path), "sae")
    with pytest.raises(ValueError, match=r"expected_average_only_in.*`sae evaluate` and `sae import`"):
        given.load(CPU)


def test_a_scaling_factor_of_ones_is_none(tmp_path: Path):
    peer = saelens("standard")
    peer.arrays["scaling_factor"] = np.ones(D_SAE, np.float32)
    given_sae(in_folder(peer, tmp_path), "sae").load(CPU)


def test_every_format_is_recognised_by_files_of_its_own():
    assert len({known.files for known in FORMATS}) == len(FORMATS)
