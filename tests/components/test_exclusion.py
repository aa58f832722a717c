"""Tokens that do not count: a planted attention sink changes nothing of what is stored, trained and measured without it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from components import steps
from components.activations.dataset import inventory
from components.activations.dataset.check import problems
from components.activations.exclusion import sinks_warning
from components.corpus.manifest import Split
from components.corpus.tokens import read_sequences
from components.interop.saelens import load_saelens
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError

CPU = torch.device("cpu")


@pytest.fixture
def tree(tiny_tree: dict, tiny_model: str, tmp_path: Path) -> dict:
    """A model whose first place has an activation about 150 times as long as the others'."""
    torch.manual_seed(0)
    words = AutoConfig.from_pretrained(tiny_model).vocab_size
    model = GPT2LMHeadModel(GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2))
    with torch.no_grad():
        others = model.transformer.wpe.weight[1:].norm(dim=1).mean()
        model.transformer.wpe.weight[0] *= 1_000 * others / model.transformer.wpe.weight[0].norm()
    folder = tmp_path / "sink"
    model.save_pretrained(folder)
    for file in Path(tiny_model).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tiny_tree["language_model"]["name"] = str(folder)
    tiny_tree["activations"] = {"hook_points": ["resid_post.0"], "dtype": "float32"}
    tiny_tree["corpus"]["bos"] = "none"
    tiny_tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baselines": []}
    tiny_tree["training"] |= {"tokens": 60_000, "learning_rate": 3e-3}
    tiny_tree["sae"] = {"d_sae": 128, "sparsity_coefficient": 0.5}
    return tiny_tree


def planned(tree: dict, **exclude) -> Specification:
    activations = {**tree["activations"], **({"exclude": exclude} if exclude else {})}
    return resolve(parse_config({**tree, "activations": activations}))


def states(plan: Specification, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Activations in float64 `[sequences, length, d_in]` and which tokens are text, by transformers alone."""
    model = GPT2LMHeadModel.from_pretrained(plan.config.language_model.name).double().eval()
    block = read_sequences(plan.token_url, plan.token_manifest(), split, 0, 10**6)
    with torch.no_grad():
        found = model(torch.tensor(block.tokens).long(), output_hidden_states=True).hidden_states[1]
    return found.numpy(), block.documents >= 0


@pytest.mark.parametrize("exclude", [{"norms_above": 10}, {"positions": [0]}])
def test_with_the_mask_scale_and_quality_are_those_of_the_data_without_sinks(tree: dict, exclude: dict):
    plan = planned(tree, **exclude)
    manifest = steps.extract(plan)
    assert list(problems(plan.dataset_url, manifest)) == []
    x, text = states(plan, "train")
    norms = np.linalg.norm(x, axis=2)
    assert np.median(norms[:, 0][text[:, 0]]) > 100 * np.median(norms[:, 1:][text[:, 1:]])
    rest = x[:, 1:][text[:, 1:]]
    assert manifest.tokens == len(rest) < text.sum()
    (column,) = manifest.columns
    assert column.scale == pytest.approx(math.sqrt(32 / np.square(rest).sum(axis=1).mean()), rel=1e-5)

    record = steps.train(plan)
    assert record.activation_scale == pytest.approx(column.scale)
    measured = steps.evaluate(plan).metrics
    x, text = states(plan, "held_out")
    text[:, 0] = False
    counted = np.flatnonzero(np.concatenate([np.ones(1, bool), text.ravel()]))[1 : 1 + measured["evaluation_tokens"]] - 1
    rows = torch.tensor(x.reshape(-1, 32)[counted])
    sae = load_saelens(Path(plan.sae_url), CPU).double()
    _, rebuilt = sae.reconstruct(rows)
    unexplained = (rows - rebuilt).square().sum() / (rows - rows.mean(dim=0)).square().sum()
    assert measured["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-2)
    assert measured["explained_variance"] > 0.3

    without = planned(tree)
    steps.extract(without)
    steps.train(without)
    assert steps.evaluate(without).metrics["mse"] > 10 * measured["mse"]
    assert without.evaluation_set(900) != plan.evaluation_set(900)


def test_token_ids_are_left_out_wherever_they_stand(tree: dict):
    everything = steps.extract(planned(tree))
    frequent = 0
    for shard in everything.shards:
        tokens = pq.read_table(Path(planned(tree).dataset_url, shard.name))["token"].to_numpy()
        frequent = int(np.bincount(tokens).argmax())
    plan = planned(tree, token_ids=[frequent])
    manifest = steps.extract(plan)
    kept = np.concatenate([pq.read_table(Path(plan.dataset_url, s.name))["token"].to_numpy() for s in manifest.shards])
    assert frequent not in kept
    assert 0 < len(kept) < everything.tokens
    assert manifest.exclusion.token_ids == (frequent,)


def test_a_mask_that_leaves_nothing_is_one_sentence(tree: dict):
    with pytest.raises(UserError, match=r"activations\.exclude: it leaves no token"):
        steps.extract(planned(tree, positions=list(range(64))))


def test_a_few_tokens_that_hold_most_of_the_norm_are_pointed_out(tree: dict, caplog: pytest.LogCaptureFixture):
    plan = planned(tree)
    manifest = steps.extract(plan)
    x, text = states(plan, "train")
    squares = np.square(x[text]).sum(axis=1)
    share = 1 - np.median(squares) / squares.mean()
    (warning,) = inventory.sinks_warnings(manifest)
    assert f"about {share:.1%} of the squared norm" in warning
    assert warning in caplog.text
    steps.train(plan)
    measured = steps.evaluate(plan)
    assert [found[:40] for found in measured.warnings] == [warning[:40]]
    assert "a few tokens hold" in Path(plan.sae_url, "report.html").read_text()

    caplog.clear()
    masked = planned(tree, positions=[0])
    assert inventory.sinks_warnings(steps.extract(masked)) == []
    steps.train(masked)
    assert steps.evaluate(masked).warnings == ()
    assert "hold" not in caplog.text


@pytest.mark.parametrize("every", [100, 5_000])
def test_sinks_are_pointed_out_however_rare(every: int):
    """Of norm 150 against 1, as SmolLM2's at its middle layer: 0.02% of the tokens already hold most."""
    squares = np.ones(10_000)
    squares[::every] = 150.0**2
    said = sinks_warning("here", float(squares.mean()), 1.0)
    assert said is not None
    assert f"about {1 - 1 / squares.mean():.1%}" in said
    unequal = np.exp(2 * np.random.default_rng(0).normal(size=100_000, scale=0.5))
    assert sinks_warning("here", float(unequal.mean()), float(np.sqrt(np.median(unequal)))) is None
