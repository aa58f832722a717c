"""Feature data and browser, against the full matrix of activations computed here."""

from __future__ import annotations

import base64
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from components import steps
from components.corpus.tokens import read_sequences
from components.evaluation.record import About
from components.interpretation import browser
from components.interpretation import examples as module
from components.interpretation.described import FeatureData
from components.interpretation.examples import Examples, Firings, bin_edges, lots
from components.interpretation.logits import logit_effects
from components.interpretation.steering import clamped
from components.interpretation.together import TokenSample
from components.interpretation.token_shares import token_shares
from components.language_model.hook_points import HookPoint
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.sae.architectures.relu import ReLUSAE, ReLUSettings

CPU = torch.device("cpu")


def planted() -> torch.Tensor:
    """`[sequences, length, d_sae]`"""
    activations = (torch.randn(40, 6, 12, generator=torch.Generator().manual_seed(0)) - 1.5).clamp_min(0)
    activations[:, :, 3] = 0.0  # never fires
    activations[:, :, 4] = (activations[:, :, 4] > 0).float()  # many ties
    activations[:, :, 5] *= 1e-9  # under the first bin
    return activations


DOCUMENTS = torch.arange(40)[:, None].expand(40, 6) // 3
POSITIONS = torch.arange(240).reshape(40, 6)
IDS = torch.randint(5, (40, 6), generator=torch.Generator().manual_seed(3))


def firings(activations: torch.Tensor, first: int) -> Firings:
    """Of sequences from `first` on, whose tokens all count."""
    count, length, _ = activations.shape
    rows, places = torch.arange(count).repeat_interleave(length), torch.arange(length).repeat(count)
    of = slice(first, first + count)
    flat = activations.reshape(count * length, -1)
    tokens, features = (flat > 0).nonzero(as_tuple=True)
    texts = (DOCUMENTS[of].reshape(-1), POSITIONS[of].reshape(-1), IDS[of].reshape(-1))
    return Firings(rows, places, *texts, tokens, features, flat[tokens, features])


def added(
    activations: torch.Tensor, batch: int, first: int = 0, earlier: tuple[Examples, TokenSample] | None = None
) -> tuple[Examples, TokenSample]:
    """earlier: of all the text before."""
    examples, together = Examples(4, 7, activations.shape[2], activations.shape[1], CPU, sampled=20), TokenSample(12, 60)
    if earlier is not None:
        examples.continue_after(earlier[0])
        together.continue_after(earlier[1])
    for start in range(0, len(activations), batch):
        part = activations[start : start + batch]
        examples.add(firings(part, first + start), first + start, len(part))
        together.add(firings(part, first + start))
    return examples, together


@pytest.mark.parametrize("logged", [1, 10_000])
@pytest.mark.parametrize(
    ("batch", "cuts", "known"),
    [(1, [], False), (3, [], False), (50, [], False), (3, [17], False), (2, [1, 9, 30], False), (2, [1, 9, 30], True)],
)
def test_what_is_kept_is_that_of_the_whole_matrix_whatever_the_batches_and_spans(
    batch: int, cuts: list[int], known: bool, logged: int, monkeypatch: pytest.MonkeyPatch
):
    """known: each span is told what was kept of those before."""
    monkeypatch.setattr(module, "_LOGGED", logged)
    monkeypatch.setattr("components.interpretation.together._FEATURES", 2)
    monkeypatch.setattr("components.interpretation.together._BLOCK", 5)
    activations = planted()
    ends = [0, *cuts, 40]
    examples, together = added(activations[: ends[1]], batch)
    for start, stop in pairwise(ends[1:]):
        part = added(activations[start:stop], batch, start, (examples, together) if known else None)
        restored = Examples(4, 7, 12, 6, CPU, sampled=20)
        restored.restore(part[0].arrays())
        examples.include(restored)
        together.include(part[1])
    found = examples.found()
    largest, flat = activations.amax(dim=1).numpy(), activations.reshape(-1, 12)
    numbers, shares = torch.arange(240), token_shares(found, 3)
    for feature in range(12):
        firing = np.flatnonzero(largest[:, feature] > 0)
        best = firing[np.argsort(-largest[firing, feature], kind="stable")][:4]
        kept = found.features == feature
        assert found.sequences[kept].tolist() == best.tolist()
        along = found.along(found.features[kept], found.sequences[kept])
        assert np.array_equal(along, activations[best, :, feature].numpy())
        assert examples.firing[feature] == len(firing)
        tokens = (flat[:, feature] > 0).nonzero()[:, 0]
        drawn = lots(DOCUMENTS.reshape(-1)[tokens], POSITIONS.reshape(-1)[tokens], torch.tensor(feature))
        sampled = tokens[drawn.argsort(descending=True)][:20]
        own, chosen = found.drawn == feature, sampled[:7]
        assert (found.drawn_sequences[own] * 6 + found.drawn_places[own]).tolist() == chosen.tolist()
        assert found.drawn_values[own].tolist() == flat[chosen, feature].tolist()
        along = found.along(found.drawn[own], found.drawn_sequences[own])
        assert np.array_equal(along, activations[chosen // 6, :, feature].numpy())
        values = flat[tokens, feature].numpy().clip(bin_edges()[0], np.nextafter(bin_edges()[-1], np.float32(0)))
        counted = np.histogram(values, bins=bin_edges().astype(np.float64))[0]
        assert examples.histogram[feature].tolist() == counted.tolist()
        by_token: dict[int, list[float]] = {}
        for token in sampled.tolist():
            by_token.setdefault(int(IDS.reshape(-1)[token]), []).append(float(flat[token, feature]))
        rows = sorted(by_token.items(), key=lambda row: (-len(row[1]), -np.float32(np.mean(sorted(row[1]))), row[0]))[:3]
        own = shares.features == feature
        assert shares.ids[own].tolist() == [token for token, _ in rows]
        assert shares.shares[own] == pytest.approx([len(row) / len(sampled) for _, row in rows])
        assert shares.means[own] == pytest.approx([np.mean(row) for _, row in rows])
        assert shares.largest[own].tolist() == [max(row) for _, row in rows]
    drawn = lots(DOCUMENTS.reshape(-1), POSITIONS.reshape(-1), torch.tensor(-2))
    on = (flat[numbers[drawn.argsort(descending=True)][:60]]).double().numpy()
    ranks = (-on).argsort(axis=1, kind="stable").argsort(axis=1)
    on = ((on > 0) & (ranks < 2)).astype(np.float64)  # those that fire most
    both, totals = on.T @ on, on.sum(axis=0)
    overlap = both / np.maximum(totals[:, None] + totals[None] - both, 1)
    np.fill_diagonal(overlap, 0)
    others, own_shares, overlaps = together.nearest(5)
    for feature in range(12):
        order = [other for other in np.lexsort((np.arange(12), -overlap[feature])) if overlap[feature, other] > 0][:5]
        assert others[feature].tolist() == order + [-1] * (5 - len(order))
        assert overlaps[feature, : len(order)] == pytest.approx(overlap[feature, order])
        assert own_shares[feature, : len(order)] == pytest.approx(both[feature, order] / max(1, totals[feature]))


def test_a_span_that_knows_those_before_keeps_less_of_its_own():
    activations = planted()
    first, told, alone = (Examples(1, 2, 12, 6, CPU) for _ in range(3))
    first.add(firings(activations[:30], 0), 0, 30)
    told.continue_after(first)
    for one in (told, alone):
        one.add(firings(activations[30:], 30), 30, 10)
    assert 0 < len(told.arrays()["keys"]) < len(alone.arrays()["keys"]) / 2


def test_lots_are_uniform_and_know_nothing_of_their_neighbours():
    grid = torch.meshgrid(torch.arange(40), torch.arange(50), torch.arange(50), indexing="ij")
    drawn = (lots(*(part.reshape(-1) for part in grid)).double() / 2.0**62).numpy().reshape(40, 50, 50)
    assert 0 <= drawn.min() < drawn.max() < 1
    assert np.abs(np.histogram(drawn, bins=10, range=(0, 1))[0] / drawn.size - 0.1).max() < 0.005
    for axis in range(3):
        first, second = (np.take(drawn, range(*ends), axis).ravel() for ends in ((0, 39), (1, 40)))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert len(np.unique(drawn)) == drawn.size


def test_quantiles_are_groups_of_equal_size_by_activation(plan: Specification):
    steps.interpret(plan)
    rows = pq.read_table(Path(plan.sae_url) / "interpretation" / "examples.parquet").to_pylist()
    features = pq.read_table(Path(plan.sae_url) / "interpretation" / "features.parquet").to_pylist()
    full = 0
    for feature in features:
        sample = [row for row in rows if row["feature"] == feature["feature"] and row["kind"] == "sample"]
        assert len(sample) == min(10, feature["fired"]) == min(10, sum(feature["histogram"]))
        assert len(feature["histogram_edges"]) == (len(feature["histogram"]) + 1 if sample else 0)
        assert [row["activation"] for row in sample] == sorted((row["activation"] for row in sample), reverse=True)
        if len(sample) == 10:
            full += 1
            assert [row["quantile"] for row in sample] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert full > 5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logit_effects_are_the_derivative_of_the_logits_but_for_the_norms_scale(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )  # fmt: skip
        model, norm = LlamaForCausalLM(config).double(), "model.norm"
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).double()
        norm = "transformer.ln_f"
    module = model.get_submodule(norm)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    rows = torch.randn(5, 16, dtype=torch.float64)
    found = logit_effects(model, HookPoint("resid_post", 0), rows, 3)
    assert found is not None
    ids, effects = found
    weight = module.weight.detach()
    written = (rows if kind == "llama" else rows - rows.mean(dim=1, keepdim=True)) * weight
    logits = written @ model.get_output_embeddings().weight.T
    order = logits.argsort(dim=1)
    assert torch.equal(ids, torch.cat([order.flip(1)[:, :3], order[:, :3]], dim=1))
    torch.testing.assert_close(effects.double(), logits.gather(1, ids), rtol=1e-5, atol=1e-5)
    assert logit_effects(model, HookPoint("mlp_in", 0), rows, 3) is None


@pytest.fixture
def plan(tiny_tree: dict) -> Specification:
    tiny_tree["interpretation"] = {"tokens": 700, "examples": 3, "drawn": 10, "logits": 4}
    tiny_tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baselines": []}
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    steps.train(plan)
    steps.evaluate(plan)
    return plan


def test_the_tables_hold_what_the_coder_does_on_the_text(plan: Specification, monkeypatch: pytest.MonkeyPatch):
    record = steps.interpret(plan)
    assert record is not None
    assert record.tokens == 700
    folder = Path(plan.sae_url) / "interpretation"
    rows = pq.read_table(folder / "examples.parquet").to_pylist()
    assert rows == sorted(rows, key=lambda row: row["feature"])
    assert len({row["feature"] for row in rows}) == record.living > 0

    from components.interop.saelens import load_saelens
    from components.language_model.hook_points import capture
    from components.language_model.loading import load_model

    block = read_sequences(plan.token_url, plan.token_manifest(), "held_out", 0, 10**6)
    text = {tuple(tokens): number for number, tokens in enumerate(block.tokens.tolist())}
    x = capture(load_model(plan.source, CPU), [plan.point], {"input_ids": torch.tensor(block.tokens).long()})[plan.point]
    found = load_saelens(Path(plan.sae_url), CPU).encode(x).dense().reshape(*x.shape[:2], -1)
    for row in rows:
        number, place = text[tuple(row["tokens"])], row["place"]
        expected = found[number, :, row["feature"]]
        firing = torch.tensor(row["activations"])
        torch.testing.assert_close(firing[firing > 0], expected[firing > 0], rtol=1e-4, atol=1e-5)
        assert row["activation"] == row["activations"][place] > 0
        assert row["kind"] == "sample" or row["activation"] == max(row["activations"])
        assert row["document"] == block.documents[number, place]
        assert row["position"] == block.positions[number, place]

    monkeypatch.setattr("components.steps.interpretation._seen", lambda *_: pytest.fail("it is there"))
    assert steps.interpret(plan) == record
    (Path(plan.sae_url) / "browser" / "index.html").unlink()
    assert steps.interpret(plan) == record
    assert (Path(plan.sae_url) / "browser" / "index.html").is_file()


def test_the_browser_is_whole_speaks_to_nobody_and_text_stays_text(plan: Specification):
    steps.interpret(plan)
    hostile = "</script><script>alert(1)</script>\u2028\u202e"
    about = About(name=hostile, language_model="m", hook_point="resid_post.1", architecture="relu", d_in=32, d_sae=plan.d_sae)
    data = FeatureData(plan.sae_url, lambda token: f"{hostile}{token}")
    browser.write_browser(plan.sae_url, about, data)
    folder = Path(plan.sae_url) / "browser"
    for path in folder.rglob("*.*"):
        content = path.read_text()
        assert not re.search(r"https?://|//[a-z0-9-]+\.[a-z]|fetch\(|XMLHttp|innerHTML|eval\(", content), path
        if path.parent.name in ("blocks", "words") or path.name == "index.js":
            assert "<" not in content
            assert "\u2028" not in content
    index = json.loads(re.fullmatch(r"index\((.*)\);", (folder / "index.js").read_text(), re.S)[1])
    assert index["about"].startswith(hostile)
    assert (index["count"], index["explained"], index["compared"]) == (plan.d_sae, 0, None)
    said = json.loads(re.fullmatch(r"words\(0, (.*)\);", (folder / "words" / "00000.js").read_text(), re.S)[1])
    assert len(said) == plan.d_sae
    block = json.loads(re.fullmatch(r"block\(1, (.*)\);", (folder / "blocks" / "00001.js").read_text(), re.S)[1])
    measured = pq.read_table(Path(plan.sae_url) / "features.parquet").to_pylist()
    density = np.frombuffer(base64.b64decode(index["columns"]["density"]), "<f4")
    assert density == pytest.approx([row["density"] for row in measured], rel=1e-3)
    first = [row[0] for row in index["first"]]
    assert first == [int(feature) for feature in np.argsort(-density, kind="stable") if density[feature] > 0][:100]
    assert all(row[1:] == said[row[0]] for row in index["first"])
    shares = pq.read_table(Path(plan.sae_url) / "interpretation" / "features.parquet").to_pylist()
    assert len(block) == index["block"]
    for number, feature in enumerate(block, index["block"]):
        assert [token for token, *_ in feature["tokens"]] == [f"{hostile}{token}" for token in shares[number]["token_ids"]]
        assert [other for other, *_ in feature["together"]] == shares[number]["together"]
        strongest = [one["activation"] for one in feature["examples"] if one["kind"] == "strongest"]
        assert strongest == sorted(strongest, reverse=True)
        assert all(one["activations"][one["peak"]] == one["activation"] for one in feature["examples"])
        assert len(feature["likely"]) == len(feature["unlikely"]) == 4


def test_search_gives_what_the_coder_does_on_the_texts(plan: Specification):
    from components.interop.saelens import load_saelens
    from components.language_model.loading import load_encoder, load_model

    texts, against = ["alpha beta 7", "gamma"], ["delta epsilon"]
    encoder, model, sae = load_encoder(plan.source), load_model(plan.source, CPU), load_saelens(Path(plan.sae_url), CPU)
    largest = []
    for ids in encoder.encode([*texts, *against]):
        states = model(torch.tensor([[encoder.bos, *ids]]), output_hidden_states=True).hidden_states[2]  # resid_post.1
        largest.append(sae.encode(states[0, 1:]).dense().amax(dim=0))
    expected = (largest[0] + largest[1]) / 2 - largest[2]
    found = steps.search_features(plan, texts, against, 5)
    assert [row["feature"] for row in found] == expected.argsort(descending=True)[: len(found)].tolist()
    for row in found:
        assert row["difference"] == pytest.approx(expected[row["feature"]].item(), rel=1e-3)
        assert row["texts"] == sum(bool(text[row["feature"]] > 0) for text in largest[:2])
        assert row["against"] == int(largest[2][row["feature"]] > 0)


def test_steering_adds_what_is_missing_along_the_decoder_row_and_keeps_the_error():
    sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=20), 8)
    sae.initialise(1)
    x = torch.randn(2, 3, 8)
    before = torch.relu(x @ sae.W_enc + sae.b_enc)[..., 4]
    found = clamped(sae, 4, 2.5)(x, x)
    torch.testing.assert_close(found, x + (2.5 - before)[..., None] * sae.W_dec[4])
    where = before > 0
    one = x[where][:1][None]
    own = clamped(sae, 4, before[where][0].item())(one, one)
    torch.testing.assert_close(own, one)


def test_steering_leaves_attention_sinks_alone():
    sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=20), 8)
    sae.initialise(1)
    x = torch.randn(2, 3, 8)
    x[:, 0] *= 1_000
    found = clamped(sae, 4, 2.5, longest=50.0)(x, x)
    assert torch.equal(found[:, 0], x[:, 0])
    torch.testing.assert_close(found[:, 1:], clamped(sae, 4, 2.5)(x, x)[:, 1:])


def test_none_where_the_configuration_wants_none(plan: Specification):
    config = plan.config.model_copy(update={"interpretation": plan.config.interpretation.model_copy(update={"tokens": 0})})
    assert steps.interpret(plan.model_copy(update={"config": config})) is None
