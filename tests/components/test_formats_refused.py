"""Peers' files that are damaged, or mean something that cannot be run here: one sentence each, and nothing of theirs is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import CENTRED, D_IN, D_SAE, MEAN_NORM, K, Peer, dictionary, gemma_scope, in_folder, saelens, sparsify, weights
from safetensors.numpy import load_file, save_file

from components.interop.formats import given_sae

CPU = torch.device("cpu")


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
    "saelens transcoder without d_out": (saelens("standard"), edit("cfg.json", architecture="transcoder"), ["d_out"]),
    "saelens cross-layer": (saelens("standard"), edit("cfg.json", architecture="cross_layer_transcoder"), ["cross_layer_tr"]),
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
    "sparsify options": (
        sparsify(), edit("cfg.json", metadata={"model_from_pretrained_kwargs": [1]}), ["from_pretrained_kwargs", "mapping"]),
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
    "gemma 2 transcoder's skip": (
        gemma_scope(second=True, transcodes=True), edit("config.json", affine_connection=True), ["W_skip"]),
    "gemma 2 hidden skip": (
        gemma_scope(second=True, transcodes=True, affine_connection=True), edit("config.json", affine_connection=False),
        ["W_skip"]),
    "gemma 2 affine": (gemma_scope(second=True), edit("config.json", affine_connection=True), ["affine_connection"]),
    "gemma 2 architecture": (gemma_scope(second=True), edit("config.json", architecture="topk"), ["jump_relu"]),
    "gemma 2 cross-layer": (
        gemma_scope(second=True), tensors("params.safetensors", W_dec=np.ones((D_SAE, 2, D_IN), np.float32)), ["W_dec"]),
    "gemma 2 cut": (gemma_scope(second=True), cut("params.safetensors"), ["cannot be read"]),
    "circuit-tracer": (saelens("standard"), only("config.yaml", "layer_0.safetensors"), ["no configuration of transcoders"]),
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
