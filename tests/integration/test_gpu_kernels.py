"""The Triton kernels against float64, in Triton's interpreter: no GPU is needed, and none is measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def checked(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "benchmarks/gpu.py", "--kernels-only", "--device", "cpu", "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, timeout=300)


def test_every_output_and_gradient_of_a_step_agrees_with_float64(tmp_path: Path):
    done = checked(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["kernels"]
    assert max(row["error"] for row in rows) < 1e-5  # of kernels that sum in float32
    found = " ".join(row["check"] for row in rows)
    for name in (
        "encoder gradient",
        "float16: pre-activations",
        "of the batch",
        "AuxK gradient to W_enc, 5 dead",
        "uneven",
        "Adam",
    ):
        assert name in found


def test_a_kernel_that_is_wrong_is_noticed(tmp_path: Path):
    """So the checks go through the kernels, and not through what torch has."""
    for folder in ("components", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    kernels = tmp_path / "components/sae/kernels/gpu/rows.py"
    right, wrong = "tl.store(out + pair, tl.sum(", "tl.store(out + pair, 2 * tl.sum("
    assert right in kernels.read_text()
    kernels.write_text(kernels.read_text().replace(right, wrong))
    done = checked(tmp_path, tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    failed = [row["check"] for row in json.loads((tmp_path / "gpu.json").read_text())["kernels"] if not row["passed"]]
    assert "encoder gradient" in failed


def test_without_a_gpu_one_sentence_says_so():
    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stdout) == (0, "There is no GPU that torch can use here, so nothing was measured.\n")
