"""SAEs that the peers' own libraries made, saved and run, against what is read of them here; and what is written, in theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from components.interop.formats import WRITERS, given_sae
from components.sae.architectures.topk import TopKSAE, TopKSettings

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
SHAKEN = """
def shaken(module):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.abs() if name == "threshold" else parameter.nan_to_num(0.0).clamp(-3, 3) + noise)
    return module
"""

DICTIONARIES = f"""
import datasets, json, sys, numpy as np, torch
from pathlib import Path
from unittest.mock import MagicMock
for unused in ("nnsight", "zstandard"):  # to read text and to buffer activations
    sys.modules[unused] = MagicMock()
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
{SHAKEN}
root, x = Path(sys.argv[1]), torch.tensor(np.load(sys.argv[2]))
made = [AutoEncoder(24, 80), AutoEncoderNew(24, 80), GatedAutoEncoder(24, 80), JumpReluAutoEncoder(24, 80),
        AutoEncoderTopK(24, 80, 7), BatchTopKSAE(24, 80, 7), MatryoshkaBatchTopKSAE(24, 80, 7, [20, 60])]
for dictionary in made:
    shaken(dictionary)
    if hasattr(dictionary, "k"):
        dictionary.threshold.fill_(0.9)
    name = type(dictionary).__name__
    (root / name).mkdir()
    torch.save(dictionary.state_dict(), root / name / "ae.pt")
    trainer = {{"dict_class": name, "activation_dim": 24, "dict_size": 80, "k": 7, "layer": 1, "lm_name": "gpt2"}}
    (root / name / "config.json").write_text(json.dumps({{"trainer": trainer, "buffer": {{"ctx_len": 8}}}}))
    # theirs with its decoder normalised, if it is theirs that does so
    loaded = dictionary if name == "AutoEncoderNew" else load_dictionary(str(root / name), "cpu")[0]
    with torch.no_grad():
        np.savez(root / f"{{name}}.npz", features=dictionary.encode(x), reconstruction=loaded(x))
"""

SPARSIFY = f"""
import sys, numpy as np, torch
from pathlib import Path
from sparsify import SparseCoder, SparseCoderConfig
{SHAKEN}
root, x = Path(sys.argv[1]), torch.tensor(np.load(sys.argv[2]))
shaken(SparseCoder(24, SparseCoderConfig(num_latents=80, k=7))).save_to_disk(root / "layers.1")
shaken(SparseCoder(24, SparseCoderConfig(expansion_factor=2, k=7))).save_to_disk(root / "layers.2")
for name in sys.argv[3:]:
    coder = SparseCoder.load_from_disk(root / name)
    with torch.no_grad():
        acts, indices, _ = coder.encode(x)
        features = torch.zeros(len(x), coder.num_latents).scatter(1, indices, acts)
        np.savez(root / f"{{name}}.npz", features=features, reconstruction=coder(x).sae_out)
"""

SAELENS = """
import sys, numpy as np, torch
from pathlib import Path
from sae_lens import SAE
root, x = Path(sys.argv[1]), torch.tensor(np.load(sys.argv[2]))
for name in sys.argv[3:]:
    sae = SAE.load_from_disk(root / name)
    with torch.no_grad():
        features = sae.encode(x)
        np.savez(root / f"{name}.npz", features=features, reconstruction=sae.decode(features))
"""

CENTRED = """
import sys, numpy as np, torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
torch.manual_seed(0)
model = HookedTransformer(HookedTransformerConfig(n_layers=2, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=20,
    act_fn="gelu", normalization_type="LN", init_weights=True, seed=0))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
tokens = torch.arange(8)[None]
names = ["blocks.0.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]
_, before = model.run_with_cache(tokens)
model.process_weights_(fold_ln=False, center_unembed=False, center_writing_weights=True)
_, after = model.run_with_cache(tokens)
np.savez(sys.argv[1], **{f"{name} {when}": cache[name][0].numpy()
    for name in names for when, cache in (("before", before), ("after", after))})
"""


@pytest.fixture
def x(tmp_path: Path) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((60, 24)).astype(np.float32) * 1.5 + 0.3
    np.save(tmp_path / "x.npy", values)
    return values


def run(peers: Path, script: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(peers), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def same(folder: Path, x: np.ndarray, result: Path) -> None:
    features, y = given_sae(folder, str(folder)).load(CPU).reconstruct(torch.tensor(x))
    expected = np.load(result)
    assert (expected["features"] > 0).any()
    np.testing.assert_allclose(features.dense(), expected["features"], rtol=1e-5, atol=1e-5, err_msg=str(folder))
    np.testing.assert_allclose(y, expected["reconstruction"], rtol=1e-5, atol=2e-5, err_msg=str(folder))


def written(folder: Path, target: Path, form: str) -> None:
    given = given_sae(folder, str(folder))
    target.mkdir()
    for name, content in WRITERS[form](given.load(CPU), given.metadata).items():
        (target / name).write_bytes(content)


def test_dictionary_learnings_dictionaries_compute_the_same_here_and_in_saelens(saelens: Path, tmp_path: Path, x: np.ndarray):
    run(saelens, DICTIONARIES, str(tmp_path), str(tmp_path / "x.npy"))
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert len(names) == 7
    for name in names:
        same(tmp_path / name, x, tmp_path / f"{name}.npz")
        written(tmp_path / name, tmp_path / f"{name}-in-saelens", "saelens")
    exported = [f"{name}-in-saelens" for name in names]
    run(saelens, SAELENS, str(tmp_path), str(tmp_path / "x.npy"), *exported)
    for name, again in zip(names, exported, strict=True):
        same(tmp_path / name, x, tmp_path / f"{again}.npz")


def test_sparsifys_coders_compute_the_same_here_and_ours_there(saelens: Path, tmp_path: Path, x: np.ndarray):
    ours = TopKSAE.autoencoder(TopKSettings(d_sae=80, k=7), 24)
    ours.initialise(seed=2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "ours"
    folder.mkdir()
    exported = ours.folded([0.6], [0.6])
    for name, content in WRITERS["sparsify"](exported, {"hook_name": "resid_post.1"}).items():
        (folder / name).write_bytes(content)
    run(saelens, SPARSIFY, str(tmp_path), str(tmp_path / "x.npy"), "layers.1", "layers.2", "ours")
    for name in ("layers.1", "layers.2", "ours"):
        same(tmp_path / name, x, tmp_path / f"{name}.npz")
    features, y = exported.reconstruct(torch.tensor(x))
    there = np.load(tmp_path / "ours.npz")
    np.testing.assert_allclose(features.dense().detach(), there["features"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y.detach(), there["reconstruction"], rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "cfg.json").read_text())["metadata"] == {"hook_name": "resid_post.1"}


def test_centred_writing_weights_take_each_tokens_mean_away_and_nothing_else(saelens: Path, tmp_path: Path):
    run(saelens, CENTRED, str(tmp_path / "caches.npz"))
    caches = np.load(tmp_path / "caches.npz")
    for name in sorted({key.split()[0] for key in caches.files}):
        before, after = caches[f"{name} before"], caches[f"{name} after"]
        assert np.abs(before.mean(axis=1)).max() > 0.05
        np.testing.assert_allclose(after, before - before.mean(axis=1, keepdims=True), atol=2e-5, err_msg=name)
