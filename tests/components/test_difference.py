"""Crosscoders of two language models: the columns of both, what is measured, and what differs between the two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components import steps
from components.activations.dataset.lookup import ActivationLookup
from components.activations.dataset.values import Values
from components.corpus.tokens import read_sequences
from components.evaluation.difference import SIDES, Scalings, sides, summarised
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.sae.architectures import architectures
from components.sae.coder import Coder, Column
from components.settings import UserError
from components.training.job import Training
from components.training.settings import TrainingSettings
from components.training.step import new_coder, take_step

CPU = torch.device("cpu")


def coder_of(name: str, width: int, d_sae: int, **settings: object) -> Coder:
    columns = (Column("resid_post.1", width), Column("second.resid_post.1", width))
    kind = architectures()[name]
    coder = kind(kind.Settings.model_validate({"d_sae": d_sae, **settings}), columns, columns, d_sae)
    coder.initialise(1)
    return coder


def test_scalings_are_the_least_squares_ones():
    """Against least squares over all tokens and dimensions, feature by feature, in float64."""
    width, d_sae = 5, 12
    coder = coder_of("relu", width, d_sae).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 2 * width, generator=generator, dtype=torch.float64)
    x[:, width:] *= 3.0  # the second model's activations are longer, which must not matter
    sums = Scalings(coder)
    sums.add(x[:150])
    sums.add(x[150:])
    found = {name: value.numpy() for name, value in sums.found().items()}

    x, f = x.numpy(), coder.encode(x).dense().detach().numpy()
    rows, bias = coder.W_dec.detach().numpy(), coder.b_dec.detach().numpy()
    parts = [slice(0, width), slice(width, 2 * width)]
    scale = [np.sqrt(width / np.mean(np.sum(x[:, part] ** 2, axis=1))) for part in parts]
    for feature in range(d_sae):
        scaled = [scale[side] * rows[feature, part] for side, part in enumerate(parts)]
        lengths = [np.linalg.norm(row) for row in scaled]
        own = int(lengths[1] > lengths[0])
        regressor = np.outer(f[:, feature], scaled[own]).ravel()[:, None]
        best = {}
        for side, part in enumerate(parts):
            written = scale[side] * (f @ rows[:, part] + bias[part])
            error = scale[side] * x[:, part] - written + np.outer(f[:, feature], scaled[side])
            for kind, target in (("nu_reconstruction", written), ("nu_error", error)):
                best[kind, side] = np.linalg.lstsq(regressor, target.ravel(), rcond=None)[0].item()
        for kind in ("nu_reconstruction", "nu_error"):
            assert found[kind][feature] == pytest.approx(best[kind, 1 - own] / best[kind, own], rel=1e-8), (kind, feature)
        expected = ((lengths[1] - lengths[0]) / max(lengths) + 1) / 2
        assert found["relative_norm"][feature] == pytest.approx(expected, rel=1e-8)


def test_a_planted_difference_is_found():
    """8 directions of both models, 4 of the first and 4 of the second alone; a BatchTopK crosscoder says which is which."""
    width, true, k = 24, 16, 2
    generator = torch.Generator().manual_seed(3)
    units = torch.linalg.qr(torch.randn(width, true, generator=generator)).Q.T
    first, second = units.clone(), units.clone()
    second[8:12], first[12:16] = 0, 0

    def tokens(count: int) -> torch.Tensor:
        strength = (torch.rand(count, true, generator=generator) < k / true) * (
            1 + 0.2 * torch.randn(count, true, generator=generator)
        )
        return torch.cat([strength @ first, strength @ second], dim=1) * (width / k) ** 0.5

    kind = architectures()["batchtopk"]
    settings = TrainingSettings(tokens=800 * 128, batch_size=128, learning_rate=3e-3, dead_after_tokens=5_000)
    columns = (Column("a", width), Column("second.a", width))
    job = Training(
        url="", digest="", identity={}, settings=settings, coder=kind.Settings(d_sae=24, k=k, decoder_init_norm=0.3),
        dataset_url="", reads=("a", "second.a"), writes=("a", "second.a"), seed=0, metadata={},
    )  # fmt: skip
    trained, mean = new_coder(job, columns, columns, CPU), torch.zeros(2 * width)
    for _ in range(800):
        x = tokens(128)
        take_step(trained, settings, x, x, mean, measured=False)
    sums = Scalings(trained.coder)
    sums.add(tokens(4_096))
    found = sums.found()
    whole = torch.cat([first, second], dim=1)
    cosine = torch.nn.functional.normalize(whole, dim=1) @ torch.nn.functional.normalize(trained.coder.W_dec, dim=1).T
    best = cosine.max(dim=1)
    assert best.values.min() > 0.9, best.values
    side = sides(found["relative_norm"].numpy())[best.indices.numpy()]
    assert side.tolist() == ["shared"] * 8 + ["first"] * 4 + ["second"] * 4
    for name in ("nu_error", "nu_reconstruction"):
        scaled = found[name][best.indices].detach()
        assert (scaled[:8] - 1).abs().max() < 0.2, scaled
        assert scaled[8:].abs().max() < 0.2, scaled
    metrics, rows, table = summarised(found, pa.table({"feature": list(range(24))}))
    assert (metrics["first_specific"], metrics["second_specific"]) == (metrics["first"], metrics["second"])
    assert [row["side"] for row in rows] == list(SIDES)
    assert table["difference_side"].to_pylist().count("first") == metrics["first"] >= 4


@pytest.fixture
def another_model(tiny_model: str, tmp_path: Path) -> str:
    """The tiny model with other weights in its last block but one."""
    from transformers import LlamaForCausalLM

    folder = tmp_path / "another"
    shutil.copytree(tiny_model, folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= -1
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pair_tree(tiny_tree: dict, another_model: str) -> dict:
    tiny_tree["language_model"]["second"] = {"name": another_model}
    tiny_tree["activations"]["hook_points"] = ["resid_post.1", "second.resid_post.1"]
    tiny_tree["training"]["crosscoder"] = ["resid_post.1", "second.resid_post.1"]
    tiny_tree["sae"] = {"architecture": "batchtopk", "k": 8, "d_sae": 64}
    return tiny_tree


def test_both_models_go_through_the_line(pair_tree: dict, another_model: str, tiny_model: str):
    from transformers import LlamaForCausalLM

    run = Specification.from_json(resolve(parse_config(pair_tree)).to_json())
    manifest = steps.extract(run)
    assert [column.hook_point for column in manifest.columns] == ["resid_post.1", "second.resid_post.1"]
    sequences = read_sequences(run.token_url, run.token_manifest(), "train", 0, 1)
    counted = sequences.documents[0] >= 0
    lookup, ids = ActivationLookup(Values(run.dataset_url, manifest)), torch.tensor(sequences.tokens).long()
    losses = {}
    for name, folder in (("resid_post.1", tiny_model), ("second.resid_post.1", another_model)):
        model = LlamaForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0][counted]
        stored = lookup(documents=sequences.documents[0][counted], positions=sequences.positions[0][counted], column=name)
        torch.testing.assert_close(stored.float(), expected, rtol=2e-3, atol=2e-3)
        losses[name] = model
    steps.train(run)
    measured = steps.evaluate(run)
    rows = {row["column"]: row for row in measured.breakdown["column"]}
    assert rows["resid_post.1"]["ce_loss_clean"] != rows["second.resid_post.1"]["ce_loss_clean"]
    held_out = read_sequences(run.token_url, run.token_manifest(), "held_out", 0, 10_000)
    for name, model in losses.items():  # each is measured in its own model
        total, count, left = 0.0, 0, 1_000
        for tokens, documents in zip(held_out.tokens, held_out.documents, strict=True):
            keep = documents >= 0
            keep &= np.cumsum(keep) <= left
            left -= int(keep.sum())
            ids = torch.tensor(tokens[None].astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0]
            predicts = torch.tensor(keep[:-1] & (documents[1:] != -2))
            loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[predicts]
            total, count = total + loss.double().sum().item(), count + int(predicts.sum())
        assert rows[name]["ce_loss_clean"] == pytest.approx(total / count, rel=1e-3), name
    assert {row["side"] for row in measured.breakdown["difference"]} == set(SIDES)
    features = pq.read_table(Path(run.sae_url) / "features.parquet")
    assert sum(row["features"] for row in measured.breakdown["difference"]) == 64 - features["nu_error"].null_count
    assert "What differs between the two models" in (Path(run.sae_url) / "report.html").read_text()
    assert steps.interpret(run) is not None
    prompt = "document 7: the sparse feature of a model fires"
    found = steps.attribute(run, prompt, "self", None, 5, True, 8)
    assert found["spearman"] > 0.5, found
    assert steps.steer(run, int(np.argmax(features["density"])), 5.0, prompt, 3)["plain"]
    _, again = steps.evaluate_given(run, run.sae_url)
    assert again.metrics["explained_variance"] == pytest.approx(measured.metrics["explained_variance"], rel=1e-5)
    config = json.loads((Path(run.sae_url) / "cfg.json").read_text())
    assert config["metadata"]["second_model_name"] == another_model


def test_the_second_model_is_part_of_what_is_stored(pair_tree: dict, tiny_model: str):
    run = resolve(parse_config(pair_tree))
    other = resolve(parse_config({**pair_tree, "language_model": {"name": tiny_model, "second": {"name": tiny_model}}}))
    assert run.token_digest == other.token_digest
    assert run.dataset_digest != other.dataset_digest
    alone = {**pair_tree, "language_model": {"name": tiny_model}}
    with pytest.raises(UserError, match=r"'second.resid_post.1' is not a hook point"):
        resolve(parse_config(alone))


def test_a_second_model_with_other_tokens_is_refused(pair_tree: dict, another_model: str):
    path = Path(another_model) / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    (one, place), (two, other) = list(vocabulary.items())[1000:1002]
    vocabulary[one], vocabulary[two] = other, place
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"language_model.second.name: the tokenizer of .* in its vocabulary"):
        resolve(parse_config(pair_tree))
    shutil.rmtree(another_model)
    with pytest.raises(UserError, match=r"language_model.second.name"):
        resolve(parse_config(pair_tree))
