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

from components.interop.saelens import load_saelens, saelens_files
from components.sae.architectures.relu import ReLUSAE, ReLUSettings

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
