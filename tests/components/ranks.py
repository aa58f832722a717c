"""Trainings by two processes that torchrun starts, beside those by one; run as a script this is one of the two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from components import steps, storage
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.sae.architectures import batchtopk, topk
from components.sae.kernels.sparse import goes_by_the_chosen
from components.sae.mesh import Mesh
from components.training.checkpoint import checkpoint_folder
from components.training.job import Training
from components.training.loop import Stopped, train
from components.training.parallel.ranks import joined
from components.training.settings import RankSettings

CPU = torch.device("cpu")
LAYOUTS = ("features", "data")
SAES: dict[str, dict[str, Any]] = {
    "batchtopk": {"architecture": "batchtopk", "k": 6, "decoder_init_norm": 0.3},
    "topk": {"architecture": "topk", "k": 6, "decoder_init_norm": 0.3},
    # Begun at random: from tokens on, one choice of 200 steps is so near a tie that rounding decides it, and two others go on.
    "matryoshka": {
        "architecture": "matryoshka",
        "k": 6,
        "decoder_init_norm": 0.3,
        "decoder_bias_init": "zeros",
        "decoder_token_share": 0.0,
    },
    "relu": {"architecture": "relu", "auxk_coefficient": 0.03, "sparsity_coefficient": 20.0, "subtract_decoder_bias": True},
    "jumprelu": {"architecture": "jumprelu", "sparsity": "target_l0", "target_l0": 6.0, "frequency_coefficient": 1.0},
    "gated": {"architecture": "gated", "sparsity_coefficient": 1.0},
}


def planned(
    tree: dict, sae: dict[str, Any], steps: int = 50, execution: Mapping[str, Any] | None = None, parts: int = 1
) -> Specification:
    training = {
        "tokens": steps * 128, "batch_size": 128, "learning_rate": 3e-3, "checkpoint_tokens": 3_000, "log_tokens": 128,
        "dead_after_tokens": 1_000, "gradient_accumulation_steps": parts,
    }  # fmt: skip
    return resolve(parse_config({**tree, "sae": {"d_sae": 128, **sae}, "training": training, "execution": execution or {}}))


def extracted(runs: Mapping[str, Specification]) -> dict[str, Training]:
    steps.extract(next(iter(runs.values())))
    return {name: run.training() for name, run in runs.items()}


def found_by_two(jobs: Mapping[str, Training], folder: Path) -> dict[str, Any]:
    """What two processes came to: the records by name and layout, and what else `main` says."""
    (folder / "jobs.json").write_bytes(TypeAdapter(dict[str, Training]).dump_json(dict(jobs)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, __file__, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4_000:]
    return json.loads((folder / "found.json").read_text())


def weights(job: Training, name: str = "") -> dict[str, torch.Tensor]:
    return load_file(f"{job.url}{name and '-'}{name}/sae_weights.safetensors")


def require_equal(job: Training, found: Mapping[str, Any], name: str) -> list[dict[str, float]]:
    """That two processes came to the losses and weights of one, which is trained here; its curves."""
    alone = train(job, CPU)
    assert len(found["curves"]) == len(alone.curves) == job.steps
    for ours, other in zip(found["curves"], alone.curves, strict=True):
        for key, value in other.items():  # the terms of the loss count as parts of it
            assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5 * max(1.0, other["loss"])), key
    expected, got = weights(job), weights(job, name)
    # The unit row of a feature that hardly reads anything is hardly defined.
    strength = expected["W_enc"].norm(dim=0).clamp(max=1.0)[:, None]
    for tensors in (expected, got):
        tensors["W_dec"] = tensors["W_dec"] * strength
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=1e-4)
    return alone.curves


def until(steps: int):
    """Stops after so many steps of this call."""
    left = iter(range(steps))
    return lambda: next(left, None) is None


def elsewhere(job: Training, name: str) -> Training:
    return replace(job, url=f"{job.url}-{name}")


def numbers(job: Training, checkpoint: str) -> dict[str, int]:
    """How many numbers each tensor of the state has."""
    return {name: tensor.numel() for name, tensor in load_file(f"{checkpoint_folder(job.url)}/{checkpoint}").items()}


def stopped(job: Training, steps: int, mesh: Mesh | None) -> int:
    try:
        train(job, CPU, should_stop=until(steps - 1), mesh=mesh)
    except Stopped as at:
        return at.step
    raise AssertionError("it was to be stopped")


def main(folder: Path) -> None:
    jobs = TypeAdapter(dict[str, Training]).validate_json((folder / "jobs.json").read_bytes())
    found = {}
    with joined(RankSettings(feature_parallel=2), CPU) as (by_features, _):
        meshes = {"features": by_features, "data": Mesh.joined(2, 1, CPU)}
        for name, job in jobs.items():
            if name.endswith("-dense"):
                topk.goes_by_the_chosen = batchtopk.goes_by_the_chosen = lambda *_: False
            for layout, mesh in meshes.items():
                found[f"{name}-{layout}"] = train(elsewhere(job, layout), CPU, mesh=mesh).model_dump(mode="json")

        topk.goes_by_the_chosen = batchtopk.goes_by_the_chosen = goes_by_the_chosen

        # Stopped and continued by as many, and by one in between.
        job = jobs["batchtopk"]
        again = elsewhere(job, "again")
        assert stopped(again, 20, by_features) == 20
        files = [name for name in storage.list_names(checkpoint_folder(again.url)) if name.endswith(".safetensors")]
        found["files"] = sorted(files)
        found["share"] = numbers(again, found["files"][1])
        found["again"] = train(again, CPU, mesh=by_features).model_dump(mode="json")
        in_parts = elsewhere(jobs["batchtopk-in-parts"], "again")
        assert stopped(in_parts, 20, meshes["data"]) == 20
        found["in-parts-again"] = train(in_parts, CPU, mesh=meshes["data"]).model_dump(mode="json")
        by_one = elsewhere(job, "by-one")
        stopped(by_one, 20, by_features)
        if by_features.leads:
            assert stopped(by_one, 10, None) == 30
            found["whole"] = numbers(by_one, "step-0000000030.safetensors")
        by_features.meet()
        found["by-one"] = train(by_one, CPU, mesh=by_features).model_dump(mode="json")

        if by_features.leads:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
