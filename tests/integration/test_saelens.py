"""The artifact in the peer library itself: SAELens loads it and computes the same.

SAELens asks for another torch than ours, so it goes into a folder of its own without its requirements and runs in a
process that sees that folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from components.interop.formats import WRITERS
from components.interop.saelens import load_saelens, saelens_files
from components.sae.architectures import architectures
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.coder import Coder, Column, Progress

pytestmark = pytest.mark.integration

PREDICT = """
import sys, numpy as np, torch
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
x = torch.tensor(np.load(sys.argv[2]))
with torch.no_grad():
    features = sae.encode(x)
    np.savez(sys.argv[2] + ".out.npz", features=features, reconstruction=sae.decode(features))
print(type(sae).__name__, sae.cfg.metadata.hook_name)
"""


def test_saelens_loads_the_artifact_and_computes_the_same(saelens: Path, tmp_path: Path):
    sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=96, decoder_init_norm=0.5), 24)
    sae.initialise(seed=0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path / "sae"
    folder.mkdir()
    metadata = {"model_name": "builtin/stdlib-llama", "hook_name": "resid_post.2", "context_size": 256, "prepend_bos": True}
    for name, content in saelens_files(sae.folded([0.4], [0.4]), metadata).items():
        (folder / name).write_bytes(content)
    x = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", PREDICT, str(folder), str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(saelens)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["StandardSAE", "resid_post.2"]
    result = np.load(tmp_path / "x.npy.out.npz")
    ours = load_saelens(folder, torch.device("cpu"))
    with torch.no_grad():
        features, reconstruction = ours.reconstruct(torch.tensor(x))
    np.testing.assert_allclose(result["features"], features.dense(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result["reconstruction"], reconstruction, rtol=1e-5, atol=1e-5)


TRANSCODE = """
import sys, numpy as np, torch
x = torch.tensor(np.load(sys.argv[2]))
if sys.argv[3] == "sparsify":
    from sparsify import SparseCoder
    sae = SparseCoder.load_from_disk(sys.argv[1])
elif sys.argv[3] == "circuit-tracer":
    # its own loader alone: the package imports what traces circuits, with libraries of other versions
    import importlib, types
    for name in ("circuit_tracer", "circuit_tracer.utils", "circuit_tracer.transcoder"):
        found = importlib.util.find_spec("circuit_tracer").submodule_search_locations if name == "circuit_tracer" else None
        package = types.ModuleType(name)
        package.__path__ = list(found) if found else [sys.modules["circuit_tracer"].__path__[0] + "/" + name.split(".")[1]]
        package.get_default_device = lambda: torch.device("cpu")
        sys.modules[name] = package
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    sae = load_transcoder_set({0: sys.argv[1] + "/layer_0.safetensors"}, "scan", "mlp.hook_in", "hook_mlp_out",
                              device=torch.device("cpu"), dtype=torch.float32)[0]
else:
    from sae_lens import SAE
    sae = SAE.load_from_disk(sys.argv[1])
with torch.no_grad():
    found = sae(x)
    np.save(sys.argv[2] + ".out.npy", found.sae_out if sys.argv[3] == "sparsify" else found)
print(type(sae).__name__)
"""


def transcoder(name: str, skip: bool, d_out: int) -> Coder:
    kind = architectures()[name]
    settings = kind.Settings.model_validate(
        {"architecture": name, "d_sae": 96, "skip": skip, **({"k": 8, "auxk_coefficient": 0.0} if "topk" in name else {})}
    )
    coder = kind(settings, (Column("mlp_in.2", 24),), (Column("mlp_out.2", d_out),), 96)
    coder.initialise(seed=0)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x, y = torch.randn(200, 24), torch.randn(200, d_out)
    coder.losses(x, y, Progress(1, 1))
    coder.after_step()
    return coder.folded([0.4], [1.7]).requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "skip", "library", "loaded"),
    [
        ("relu", False, "saelens", "Transcoder"),
        ("relu", True, "saelens", "SkipTranscoder"),
        ("batchtopk", False, "saelens", "JumpReLUTranscoder"),
        ("jumprelu", True, "saelens", "JumpReLUSkipTranscoder"),
        ("topk", False, "sparsify", "SparseCoder"),
        ("topk", True, "sparsify", "SparseCoder"),
        ("relu", False, "circuit-tracer", "SingleLayerTranscoder"),
        ("relu", True, "circuit-tracer", "SingleLayerTranscoder"),
        ("batchtopk", True, "circuit-tracer", "SingleLayerTranscoder"),
    ],
)
def test_peers_compute_the_same_with_a_transcoder_of_ours(
    saelens: Path, name: str, skip: bool, library: str, loaded: str, tmp_path: Path
):
    coder, folder = transcoder(name, skip, 16 if library == "saelens" else 24), tmp_path / "layers.0.mlp"
    folder.mkdir()
    for file, content in WRITERS[library](coder, {"hook_name": "mlp_in.0", "hook_name_out": "mlp_out.0"}).items():
        (folder / file).write_bytes(content)
    x = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", TRANSCODE, str(folder), str(tmp_path / "x.npy"), library]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(saelens)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == loaded
    np.testing.assert_allclose(np.load(tmp_path / "x.npy.out.npy"), coder(torch.tensor(x)), rtol=1e-5, atol=1e-5)


def test_saelens_refuses_what_it_has_no_name_for(saelens: Path, tmp_path: Path):
    """A TopK transcoder of one width has the tensors of a TopK autoencoder, and must not be taken for one."""
    for file, content in saelens_files(transcoder("topk", False, 24), {}).items():
        (tmp_path / file).write_bytes(content)
    np.save(tmp_path / "x.npy", np.zeros((2, 24), np.float32))
    command = [sys.executable, "-c", TRANSCODE, str(tmp_path), str(tmp_path / "x.npy"), "saelens"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(saelens)})
    assert done.returncode != 0
    assert "topk_transcoder" in done.stderr
