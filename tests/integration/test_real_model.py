"""The line on a real language model, whose first tokens are attention sinks of 150 times the usual norm: with the mask, every
number is that of the same data without them, with a BOS token and without."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from components import steps
from components.activations.dataset import inventory
from components.corpus.tokens import PADDING, Sequences, read_sequences
from components.interop.saelens import load_saelens
from components.language_model import fetched
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
LAYER = 14


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M in the user's cache, where it stays from one test session to the next."""
    try:
        return fetched.fetch("smollm2-135m-instruct")
    except UserError as error:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(str(error))


def planned(folder: Path, bos: str, **exclude: object) -> Specification:
    tree = {
        "name": "real",
        "device": "cpu",
        "storage": {"root": str(folder)},
        "corpus": {"context_length": 64, "bos": bos, "train_tokens": 2_000, "held_out_tokens": 500},
        "language_model": {"name": "fetched/smollm2-135m-instruct", "batch_sequences": 8},
        "activations": {"hook_points": [f"resid_post.{LAYER}"], "exclude": exclude},
        "sae": {"architecture": "batchtopk", "d_sae": 256, "k": 16, "decoder_init_norm": 0.3},
        "training": {"tokens": 40_000, "batch_size": 256, "learning_rate": 2e-3, "dead_after_tokens": 10_000},
        "evaluation": {"tokens": 500, "reference_tokens": 1_000, "baselines": []},
    }
    return resolve(parse_config(tree))


@dataclass(frozen=True)
class Alone:
    """A block of text in the model, by transformers and hooks of its own."""

    model: torch.nn.Module
    block: Sequences

    @cached_property
    def clean(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations `[n, length, d_in]` and the loss of predicting each next token `[n, length - 1]`."""
        return self.passed(None)

    def passed(self, replaced: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        ids, kept = torch.tensor(self.block.tokens).long(), []

        def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            kept.append(output)
            return output if replaced is None else replaced

        handle = self.model.model.layers[LAYER].register_forward_hook(hook)
        with torch.no_grad():
            logits = self.model(ids, use_cache=False).logits
        handle.remove()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return kept[0], losses.reshape(len(ids), -1)


@pytest.mark.parametrize("bos", ["sequence", "none"])
def test_with_the_mask_all_numbers_are_those_of_the_data_without_its_sinks(real_model: Path, tmp_path: Path, bos: str):
    plan = planned(tmp_path, bos, norms_above=10)
    manifest = steps.extract(plan)
    model = AutoModelForCausalLM.from_pretrained(real_model).eval()

    def alone(split: str) -> tuple[Alone, torch.Tensor, torch.Tensor]:
        block = read_sequences(plan.token_url, plan.token_manifest(), split, 0, 10**6)  # type: ignore[arg-type]
        found, text = Alone(model, block), torch.tensor(block.documents >= 0)
        return found, text, found.clean[0].norm(dim=2)

    text_of_training, text, norms = alone("train")
    middle = norms[text & (torch.arange(64) > 0)].median()
    assert (norms[:, 0] > 100 * middle).all()
    kept = text_of_training.clean[0][text & (norms <= 10 * norms[text].median())].double()
    assert manifest.tokens == len(kept)
    (column,) = manifest.columns
    assert column.scale == pytest.approx((576 / kept.square().sum(dim=1).mean().item()) ** 0.5, rel=0.01)
    np.testing.assert_allclose(column.mean, kept.mean(dim=0).numpy(), atol=0.01 * column.median_norm)
    assert inventory.sinks_warnings(manifest) == []

    steps.train(plan)
    record = steps.evaluate(plan)
    measured = record.metrics
    assert record.warnings == ()
    held_out, text, norms = alone("held_out")
    x, clean = held_out.clean
    counted = text & (norms <= 10 * norms[text].median())
    assert measured["evaluation_tokens"] == int(counted.sum())
    sae = load_saelens(Path(plan.sae_url), CPU)
    with torch.no_grad():
        _, rebuilt = sae.reconstruct(x[counted])
    unexplained = (x[counted] - rebuilt).square().sum() / (x[counted] - x[counted].mean(dim=0)).square().sum()
    assert measured["explained_variance"] == pytest.approx(1 - unexplained.item(), abs=0.01)
    assert measured["explained_variance"] > 0.2

    # A loss counts where a token counts and any but padding follows it; what does not count keeps its own activation.
    predicts = counted[:, :-1] & torch.tensor(held_out.block.documents[:, 1:] != PADDING)
    losses = [clean[predicts].mean().item()]
    for values in (rebuilt, torch.zeros_like(rebuilt)):
        spliced = x.clone()
        spliced[counted] = values
        losses.append(held_out.passed(spliced)[1][predicts].mean().item())
    found = [measured[f"ce_loss_{name}"] for name in ("clean", "sae", "zero")]
    assert found == pytest.approx(losses, rel=0.01)
    recovered = (losses[2] - losses[1]) / (losses[2] - losses[0])
    assert measured["loss_recovered"] == pytest.approx(recovered, abs=0.01)


def test_without_the_mask_it_is_said_that_a_few_tokens_decide_everything(real_model: Path, tmp_path: Path):
    plan = planned(tmp_path, "none")
    manifest = steps.extract(plan)
    (warning,) = inventory.sinks_warnings(manifest)
    assert "resid_post.14: a few tokens hold about 99" in warning
    assert manifest.columns[0].median_norm < 500 < 1_500 < manifest.columns[0].mean_squared_norm ** 0.5
