"""Activations that no SAE can be trained on are refused with their true reason, and not stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components import steps
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError


def run_on(tree: dict, tiny_model: str, folder: Path, dtype: str, **factors: float) -> Specification:
    """The tiny model with all that writes to the residual stream taken away, and its embedding times a factor."""
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        for part, factor in factors.items():
            if part in name:
                tensors[name] = tensor * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**tree["activations"], "dtype": dtype}
    return resolve(parse_config({**tree, "language_model": {"name": str(folder)}, "activations": settings}))


SILENT = {"o_proj": 0.0, "down_proj": 0.0}


@pytest.mark.parametrize(
    ("factors", "dtype", "message"),
    [
        ({**SILENT, "embed_tokens": 0.0}, "float16", r"^activations\.hook_points: every activation at resid_post\.1 is zero"),
        ({"embed_tokens": float("nan")}, "float16", r"^language_model\.dtype: .* resid_post\.1 are not finite in 'float32'"),
        ({"embed_tokens": float("nan")}, "float32", r"^language_model\.dtype: .* resid_post\.1 are not finite in 'float32'"),
        ({**SILENT, "embed_tokens": 1e7}, "float16", r"^activations\.dtype: 'float16' cannot hold .*overflow"),
        ({**SILENT, "embed_tokens": 1e-7}, "float16", r"^activations\.dtype: 'float16' loses \d+% of .*too small for it"),
    ],
)
def test_activations_that_say_nothing_are_refused(
    factors: dict, dtype: str, message: str, tiny_tree: dict, tiny_model: str, tmp_path: Path
):
    run = run_on(tiny_tree, tiny_model, tmp_path / "model", dtype, **factors)
    with pytest.raises(UserError, match=message):
        steps.extract(run)
    assert run.dataset_manifest() is None


@pytest.mark.parametrize(("factor", "dtype"), [(1e-7, "bfloat16"), (1e-7, "float32"), (1.0, "float16"), (1.0, "bfloat16")])
def test_what_a_format_holds_is_stored(factor: float, dtype: str, tiny_tree: dict, tiny_model: str, tmp_path: Path):
    run = run_on(tiny_tree, tiny_model, tmp_path / "model", dtype, embed_tokens=factor, **SILENT)
    manifest = steps.extract(run)
    embedding = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"].double()
    assert 0 < manifest.columns[0].mean_squared_norm <= float(torch.linalg.norm(embedding, dim=1).max()) ** 2 * 1.01
