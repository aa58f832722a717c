"""What is read of the peers' files against each peer's formula, and what is written again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peers import (
    CENTRED,
    D_IN,
    D_SAE,
    MEAN_NORM,
    TENSORS,
    K,
    Peer,
    average,
    centred,
    circuit_tracer,
    constant_norm,
    dictionary,
    double,
    gemma_scope,
    in_folder,
    inputs,
    layer_norm,
    rounded,
    saelens,
    sparsify,
)  # fmt: skip
from safetensors.numpy import load_file

from components.interop.circuit_tracer import circuit_tracer_files
from components.interop.formats import FORMATS, given_sae
from components.interop.saelens import saelens_files
from components.interop.sparsify import sparsify_files

CPU = torch.device("cpu")

TRANSCODERS = ("sparsify transcoder", "sparsify skip transcoder")
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
    "sparsify transcoder": sparsify(transcode=True),
    "sparsify skip transcoder": sparsify(transcode=True, skip_connection=True),
    **{
        f"circuit-tracer {name}": circuit_tracer(name)
        for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
    },
    "circuit-tracer topk": circuit_tracer("topk_transcoder", activation="topk", k=K),
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
    "gemma scope 2 transcoder": gemma_scope(second=True, lower=True, transcodes=True),
    "gemma scope 2 skip transcoder": gemma_scope(second=True, lower=True, transcodes=True, affine_connection=True),
}  # fmt: skip
EXACT["sparsify by factor"].arrays = {
    name: value[: 2 * D_IN] if name != "b_dec" else value for name, value in EXACT["sparsify"].arrays.items()
}


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


@pytest.mark.parametrize("name", ["saelens topk", "saelens topk by length", "sparsify", "AutoEncoderTopK", *TRANSCODERS])
def test_what_is_written_as_sparsify_follows_its_formula(name: str, tmp_path: Path):
    peer, x = EXACT[name], inputs()
    given = given_sae(in_folder(peer, tmp_path), peer.address)
    (tmp_path / "again").mkdir()
    for file, content in sparsify_files(given.load(CPU), {"hook_name": "resid_post.3"}).items():
        (tmp_path / "again" / file).write_bytes(content)
    arrays = load_file(tmp_path / "again" / "sae.safetensors")
    assert {file: value.shape for file, value in arrays.items()} == {
        "encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,),
        **({"W_skip": (D_IN, D_IN)} if "skip" in name else {}),
    }  # fmt: skip
    features, reconstruction = (peer if name in TRANSCODERS else sparsify()).compute(x.astype(np.float64), double(arrays))
    expected_features, expected = peer.compute(x.astype(np.float64), double(peer.arrays))
    np.testing.assert_allclose(reconstruction, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features, expected_features, rtol=1e-5, atol=1e-5)
    again = given_sae(tmp_path / "again", "again")
    assert again.metadata == {"hook_name": "resid_post.3"}
    np.testing.assert_allclose(again.load(CPU).reconstruct(torch.tensor(x))[1].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in EXACT if "circuit-tracer" in name and "topk" not in name])
def test_what_is_written_for_circuit_tracer_has_the_tensors_that_were_read(name: str, tmp_path: Path):
    peer = EXACT[name]
    given = given_sae(in_folder(peer, tmp_path), peer.address)
    metadata = {"model_name": "google/gemma-2-2b", "hook_name": "mlp_in.4", "hook_name_out": "mlp_out.4"}
    (tmp_path / "again").mkdir()
    for file, content in circuit_tracer_files(given.load(CPU), metadata).items():
        (tmp_path / "again" / file).write_bytes(content)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"config.yaml", "layer_4.safetensors"}
    found = load_file(tmp_path / "again" / "layer_4.safetensors")
    assert set(found) == set(peer.arrays)
    for key, value in found.items():
        np.testing.assert_allclose(value, peer.arrays[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["saelens standard", "circuit-tracer topk"])
def test_what_circuit_tracer_has_no_form_for_is_refused(name: str, tmp_path: Path):
    given = given_sae(in_folder(EXACT[name], tmp_path), EXACT[name].address)
    with pytest.raises(ValueError, match="circuit-tracer has no"):
        circuit_tracer_files(given.load(CPU), given.metadata)


@pytest.mark.parametrize("name", ["saelens standard", "saelens jumprelu", "saelens gated", "saelens topk layer norm"])
def test_what_sparsify_has_no_form_for_is_refused(name: str, tmp_path: Path):
    given = given_sae(in_folder(EXACT[name], tmp_path), "sae")
    with pytest.raises(ValueError, match=r"sparsify has no .*; accepted for .* saelens"):
        sparsify_files(given.load(CPU), {})


@pytest.mark.parametrize(
    ("peer", "metadata"),
    [
        (sparsify(), {"hook_name": "layers.3"}),
        (sparsify(transcode=True), {"hook_name": "layers.3:in", "hook_name_out": "layers.3"}),
        (
            circuit_tracer("transcoder"),
            {
                "hook_name": "blocks.4.mlp.hook_in",
                "hook_name_out": "blocks.4.hook_mlp_out",
                "model_name": "google/gemma-2-2b",
            },
        ),
        (dictionary("AutoEncoder"), {"hook_name": "resid_post.3", "model_name": "EleutherAI/pythia-70m"}),
        (dictionary("AutoEncoder", submodule_name=None), {"model_name": "EleutherAI/pythia-70m"}),
        (gemma_scope(), {"hook_name": "resid_post.20", "model_name": "google/gemma-2-2b"}),
        (gemma_scope(second=True), {"hook_name": "model.layers.5", "model_name": "gemma-3-270m"}),
        (
            gemma_scope(second=True, hf_hook_point_in="model.layers.5.post_feedforward_layernorm.output"),
            {"hook_name": "mlp_out.5", "model_name": "gemma-3-270m"},
        ),
        (
            gemma_scope(second=True, transcodes=True),
            {"hook_name": "mlp_in.5", "hook_name_out": "mlp_out.5", "model_name": "gemma-3-270m"},
        ),
        (
            gemma_scope(second=True, hf_hook_point_in="model.layers.5.self_attn.o_proj.input"),
            {"hook_name": "model.layers.5.self_attn.o_proj:in", "model_name": "gemma-3-270m"},
        ),
    ],
)
def test_model_and_hook_point_are_found_where_the_format_has_them(peer: Peer, metadata: dict, tmp_path: Path):
    assert given_sae(in_folder(peer, tmp_path), peer.address).metadata == metadata


def test_a_mean_norm_that_nobody_measured_is_not_taken_for_one(tmp_path: Path):
    given = given_sae(in_folder(EXACT["saelens standard mean norm"], tmp_path), "sae")
    with pytest.raises(ValueError, match=r"expected_average_only_in.*`sae evaluate` and `sae import`"):
        given.load(CPU)


def test_a_scaling_factor_of_ones_is_none(tmp_path: Path):
    peer = saelens("standard")
    peer.arrays["scaling_factor"] = np.ones(D_SAE, np.float32)
    given_sae(in_folder(peer, tmp_path), "sae").load(CPU)


def test_every_format_is_recognised_by_files_of_its_own():
    assert len({(known.files, known.numbered) for known in FORMATS}) == len(FORMATS)
