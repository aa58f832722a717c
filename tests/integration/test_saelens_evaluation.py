"""SAELens' own SAEs and its own evaluation against ours: the same functions, and the same metrics where they mean the same.

SAELens runs our language model through its wrapper of transformers' models (`HookedProxyLM`), on the same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from components import steps
from components.corpus.tokens import read_sequences
from components.interop.saelens import load_saelens
from components.run.config import parse_config
from components.run.specification import resolve

pytestmark = pytest.mark.integration

MAKE = """
import json, sys, numpy as np, torch
from pathlib import Path
from sae_lens import SAE
from sae_lens.saes import (
    GatedSAE, GatedSAEConfig, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig,
)
root, x = Path(sys.argv[1]), torch.tensor(np.load(sys.argv[2]))
classes = {"standard": (StandardSAE, StandardSAEConfig), "topk": (TopKSAE, TopKSAEConfig),
           "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig), "gated": (GatedSAE, GatedSAEConfig)}
for name, (architecture, options) in json.loads(sys.argv[3]).items():
    sae_class, config_class = classes[architecture]
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=24, d_sae=80, **options))
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if key == "threshold":
                parameter.abs_()
    sae.save_model(root / name)
    sae = SAE.load_from_disk(root / name)
    # What SAELens leaves to its activation scaler while it trains, and folds afterwards.
    scale = 24 ** 0.5 / x.norm(dim=-1).mean() if options.get("normalize_activations") == "expected_average_only_in" else 1.0
    with torch.no_grad():
        features = sae.encode(x * scale)
        np.savez(root / (name + ".npz"), features=features, reconstruction=sae.decode(features) / scale)
"""

SAES = {
    f"{architecture}-{number}": (architecture, {**more, **options})
    for architecture, more in {"standard": {}, "topk": {"k": 7}, "jumprelu": {}, "gated": {}}.items()
    for number, options in enumerate(
        [
            {"apply_b_dec_to_input": True},
            {"apply_b_dec_to_input": False},
            {"normalize_activations": "expected_average_only_in"},
            {"normalize_activations": "constant_norm_rescale"},
            {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
            *([{"rescale_acts_by_decoder_norm": True}] if architecture == "topk" else []),
        ]
    )
}


def in_saelens(saelens: Path, script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(saelens), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_saes_that_saelens_made_compute_the_same_here(saelens: Path, tmp_path: Path):
    x = np.random.default_rng(0).standard_normal((60, 24)).astype(np.float32) * 3 + 0.5
    np.save(tmp_path / "x.npy", x)
    in_saelens(saelens, MAKE, str(tmp_path), str(tmp_path / "x.npy"), json.dumps(SAES))
    mean_norm = float(np.linalg.norm(x, axis=1).mean())
    for name in SAES:
        expected = np.load(tmp_path / f"{name}.npz")
        with torch.no_grad():
            encoded, x_hat = load_saelens(tmp_path / name, torch.device("cpu"), mean_norm).reconstruct(torch.tensor(x))
        features = encoded.dense()
        assert (features > 0).any(), name
        np.testing.assert_allclose(features, expected["features"], rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(x_hat, expected["reconstruction"], rtol=1e-4, atol=1e-4, err_msg=name)


EVALUATE = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from sae_lens import SAE
from sae_lens.evals import EvalConfig, get_recons_loss, run_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler

tokens = torch.tensor(np.load(sys.argv[3])).long()

class Text:
    "The tokens of our dataset in the place of SAELens' activation store, whole sequences in order."
    store_batch_size_prompts, context_size = 8, tokens.shape[1]
    def __init__(self): self.reset_input_dataset()
    def reset_input_dataset(self): self.batches = iter(tokens.split(8))
    def get_batch_tokens(self, size): return next(self.batches)

sae = SAE.load_from_disk(sys.argv[1])
sae.cfg.metadata.hook_name = "model.layers.1"
model = HookedProxyLM(AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval(), AutoTokenizer.from_pretrained(sys.argv[2]))
count = len(tokens.split(8))
config = EvalConfig(batch_size_prompts=8, n_eval_reconstruction_batches=count, n_eval_sparsity_variance_batches=count,
    compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
    compute_variance_metrics=True, compute_featurewise_density_statistics=True)
metrics, features = run_evals(sae, Text(), model, ActivationScaler(), config)
with torch.no_grad():
    parts = get_recons_loss(sae, model, ActivationScaler(), tokens, compute_kl=True, compute_ce_loss=True, ignore_tokens=[0])
kl = parts["kl_div_with_sae"][:, :-1][tokens[:, :-1] != 0].mean().item()
flat = {name: value for group in metrics.values() for name, value in group.items()}
print(json.dumps({**flat, "kl_without_last": kl, "density": features["feature_density"]}))
"""


@pytest.fixture(scope="module")
def compared(
    saelens: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: str, text_corpus: str
) -> tuple[dict, dict, list]:
    """Our metrics and those of SAELens of the same trained SAE on the same whole sequences, and our densities."""
    root = tmp_path_factory.mktemp("compared")
    tree = {
        "name": "tiny", "device": "cpu", "storage": {"root": str(root)},
        "corpus": {"source": "files", "paths": [text_corpus], "context_length": 32, "held_out_fraction": 0.2,
                   "train_tokens": 6_000, "held_out_tokens": 3_000},
        "language_model": {"name": tiny_model}, "activations": {"hook_points": ["resid_post.1"]}, "sae": {"d_sae": 64},
        "training": {"tokens": 20_000, "batch_size": 256}, "evaluation": {"baselines": []},
    }  # fmt: skip
    plan = resolve(parse_config(tree))
    steps.extract(plan)
    steps.train(plan)
    manifest = plan.token_manifest()
    block = read_sequences(plan.token_url, manifest, "held_out", 0, 10**6)
    whole = (block.documents != -2).all(axis=1)  # all but the last one, which is padded
    # As many tokens as the whole sequences hold: ours stops there.
    tree["evaluation"]["tokens"] = int((block.documents[whole] >= 0).sum())
    plan = resolve(parse_config(tree))
    ours = steps.evaluate(plan).metrics
    np.save(root / "tokens.npy", block.tokens[whole])
    theirs = json.loads(in_saelens(saelens, EVALUATE, plan.sae_url, tiny_model, str(root / "tokens.npy")).splitlines()[-1])
    assert ours["evaluation_tokens"] == int((block.tokens[whole] != 0).sum())
    return ours, theirs, pq.read_table(f"{plan.sae_url}/features.parquet")["density"].to_pylist()


@pytest.mark.parametrize(
    ("name", "theirs", "factor"),
    [
        ("ce_loss_clean", "ce_loss_without_sae", 1),
        ("ce_loss_sae", "ce_loss_with_sae", 1),
        ("l0", "l0", 1),
        ("mse", "mse", 1 / 32),  # theirs sums over the 32 dimensions
        ("explained_variance", "explained_variance", 1),
        ("cosine_similarity", "cossim", 1),
        ("norm_ratio", "l2_ratio", 1),
        ("kl_divergence", "kl_without_last", 1),
    ],
)
def test_metrics_that_mean_the_same_are_the_same(compared: tuple, name: str, theirs: str, factor: float):
    assert compared[0][name] == pytest.approx(compared[1][theirs] * factor, rel=2e-5)


def test_feature_densities_are_the_same(compared: tuple):
    assert compared[2] == pytest.approx(compared[1]["density"], abs=1e-6)


def test_what_differs_differs_as_documented(compared: tuple):
    ours, theirs, _ = compared
    # theirs also replaces BOS and separators by zero
    assert theirs["ce_loss_with_ablation"] != pytest.approx(ours["ce_loss_zero"], rel=1e-4)
    # theirs also counts the last position of a sequence, which predicts nothing
    assert theirs["kl_div_with_sae"] == pytest.approx(ours["kl_divergence"], rel=0.1)
    assert theirs["kl_div_with_sae"] != pytest.approx(ours["kl_divergence"], rel=1e-6)
