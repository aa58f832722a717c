"""Coders that came out badly: each is evaluated, refused by the name of a gate, and has a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components import steps, storage
from components.run.config import parse_config
from components.run.specification import Specification, resolve

BOUNDS = """
evaluation_tokens: 100
bounds:
  loss_recovered: {at_least: 0.5}
  explained_variance: {at_least: 0.0}
  dead_fraction: {at_most: 0.1}
  l0: {at_least: 0.1, at_most: 60}
"""


def _filled(tensors: dict, **values: float) -> dict:
    return {name: torch.full_like(tensor, values[name]) if name in values else tensor for name, tensor in tensors.items()}


BAD = {
    "dead and writing nothing": lambda tensors: _filled(tensors, W_enc=0.0, b_enc=-1.0, b_dec=0.0),
    "constant": lambda tensors: _filled(tensors, W_enc=0.0, b_enc=1.0),
    "beyond float32": lambda tensors: {name: tensor * 1e25 for name, tensor in tensors.items()},
    "upside down": lambda tensors: {**tensors, "W_dec": -tensors["W_dec"]},
}


@pytest.fixture(scope="module")
def plan(tiny_model: str, text_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Specification:
    """Of a line whose SAE is trained."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "gates.yaml").write_text(BOUNDS)
    tree = {
        "name": "bad",
        "device": "cpu",
        "storage": {"root": str(folder / "root")},
        "corpus": {
            "source": "files", "paths": [text_corpus], "context_length": 32, "held_out_fraction": 0.2,
            "train_tokens": 3_000, "held_out_tokens": 600,
        },
        "language_model": {"name": tiny_model},
        "activations": {"hook_points": ["resid_post.1"]},
        "sae": {"d_sae": 64},
        "training": {"tokens": 2_560, "batch_size": 256},
        "evaluation": {"tokens": 400},
        "tracking": {"gates": str(folder / "gates.yaml")},
    }  # fmt: skip
    plan = resolve(parse_config(tree))
    steps.extract(plan)
    steps.train(plan)
    return plan


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_coder_is_evaluated_refused_by_a_gate_and_has_a_report(plan: Specification, kind: str):
    weights = Path(plan.sae_url, "sae_weights.safetensors")
    trained = weights.with_name("trained")  # each is made of the same good one
    if not trained.exists():
        weights.rename(trained)
    save_file(BAD[kind](load_file(trained)), weights)
    record = storage.read_json(f"{plan.sae_url}/training.json")
    curves = [{**point, "l0": 0.0, "explained_variance": 0.0, "dead_fraction": 1.0} for point in record["curves"]]
    changed = {**record, "curves": curves, "weights_sha256": storage.file_sha256(weights)}
    storage.put_json(changed, f"{plan.sae_url}/training.json")

    measured = steps.evaluate(plan)
    json.dumps(measured.metrics, allow_nan=False)
    with steps.tracked(plan, {}) as run:
        outcome = steps.register(plan, run)
        beside = steps.comparison(plan, outcome)
    assert outcome.alias == "challenger"
    named = [row["gate"] for row in beside["gates"] if row["verdict"] == "fail"]
    assert set(named) & {"loss_recovered", "explained_variance", "dead_fraction", "l0"}
    assert all(gate in outcome.alias_reason for gate in named)
    page = Path(plan.sae_url, "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "nan" not in page.lower()
