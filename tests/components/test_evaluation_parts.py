"""The parts of an evaluation: splicing, losses, intervals, baselines, feature table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from components.activations.exclusion import NOTHING
from components.evaluation import baselines
from components.evaluation import intervals as bootstrap
from components.evaluation.baselines import Rows
from components.evaluation.features import FeatureSums, feature_table, nearest_rows
from components.evaluation.metrics import Totals, column_names, token_losses
from components.evaluation.reference import Reference
from components.evaluation.splicing import Splicer, mlp_output
from components.language_model.hook_points import HookPoint, spliced_logits
from components.sae.features import DenseFeatures

CPU = torch.device("cpu")
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, initializer_range=0.3)),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    ),
}


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double().eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_in"])
@pytest.mark.parametrize("layer", [0, 2])
def test_continuing_from_the_hook_point_gives_the_logits_of_whole_passes(name: str, kind: str, layer: int):
    model, point = model_of(name), HookPoint(kind, layer)
    tokens = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))
    splicer = Splicer(model, point)
    x, clean = splicer.clean({"input_ids": tokens})
    torch.testing.assert_close(clean, model(tokens).logits)
    others = torch.stack([x.flip(-1), torch.zeros_like(x), x + 1])
    expected = torch.stack([spliced_logits(model, point, lambda _, other=other: other, tokens) for other in others])
    torch.testing.assert_close(splicer.spliced(others), expected, rtol=1e-10, atol=1e-10)
    assert (expected[0] - clean).abs().max() > 1e-3
    torch.testing.assert_close(model(tokens).logits, clean)


def test_blocks_below_the_hook_point_run_once(monkeypatch: pytest.MonkeyPatch):
    model = model_of("llama")
    runs = [0, 0, 0]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    splicer = Splicer(model, HookPoint("resid_post", 1))
    tokens = torch.zeros(2, 5, dtype=torch.long)
    for _ in range(3):
        x, _ = splicer.clean({"input_ids": tokens})
        splicer.spliced(x[None])
    assert runs == [3, 3, 7]  # the last one also in the check of the first batch


def test_a_model_that_carries_more_than_the_stream_is_run_in_full():
    model = model_of("llama")
    memory = {}
    model.model.layers[0].self_attn.register_forward_hook(lambda _m, _a, output: memory.update(value=output[0]))
    # the last block adds what the first one's attention gave in this very pass
    model.model.layers[2].register_forward_hook(lambda _m, _a, output: output + memory.pop("value"))
    point = HookPoint("resid_post", 1)
    tokens = torch.randint(50, (3, 7))
    splicer = Splicer(model, point)
    x, _ = splicer.clean({"input_ids": tokens})
    expected = spliced_logits(model, point, lambda _: 2 * x, tokens)
    torch.testing.assert_close(splicer.spliced(2 * x[None])[0], expected)


def test_losses_are_those_of_plain_softmax():
    generator = torch.Generator().manual_seed(0)
    clean, other = torch.randn(2, 9, 11, generator=generator, dtype=torch.float64)
    targets = torch.arange(9)
    ce, others, kl = token_losses(clean, other[None], targets, [True])
    p, q = clean.exp() / clean.exp().sum(1, keepdim=True), other.exp() / other.exp().sum(1, keepdim=True)
    torch.testing.assert_close(ce, -p[range(9), targets].log())
    torch.testing.assert_close(others[0], -q[range(9), targets].log())
    torch.testing.assert_close(kl[0], (p * (p / q).log()).sum(1))


def sums_of(documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sums of four-dimensional activations, one row per document, for one variant."""
    generator = np.random.default_rng(seed)
    table, shifted = [], []
    for _ in range(documents):
        x = generator.normal(size=(generator.integers(3, 30), 4)) + generator.normal(size=4)
        n = len(x)
        sae = [0.3 * n, 5.0 * n, 0.9 * n, 0.9 * n, 3.1 * n * generator.uniform(0.9, 1.1), 0.1 * n]
        rest = [[0.0] * 4 + [loss * n, 0.0] for loss in (9.0, 7.0)]
        table.append([n, n, (x**2).sum(), 3.0 * n, *sae, *rest[0], *rest[1]])
        shifted.append(x.sum(axis=0))
    return np.array(table), np.array(shifted)


VARIANTS = ("sae", "zero", "mean")


def summary(table: np.ndarray, shifted: np.ndarray) -> dict[str, np.ndarray]:
    return Totals(table, shifted, VARIANTS).summary()


def test_intervals_are_those_of_a_loop_over_resamples():
    table, shifted = sums_of(7)
    found = bootstrap.intervals(table, shifted, summary, resamples=300, seed=5)
    weights = np.concatenate(list(bootstrap.multinomial_weights(7, 300, 5)))
    drawn = []
    for row in weights.astype(int):
        rows = [number for number, times in enumerate(row) for _ in range(times)]
        total, mean = sum(table[n] for n in rows), sum(shifted[n] for n in rows)
        variance = total[2] - (mean**2).sum() / total[0]
        ce = {"clean": total[3], "sae": total[8], "zero": total[14]}
        drawn.append((1 - total[4] / variance, (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]), total[8] / total[1]))
    for name, values in zip(("explained_variance", "loss_recovered", "ce_loss_sae"), zip(*drawn, strict=True), strict=True):
        assert found[name] == pytest.approx((np.percentile(values, 2.5), np.percentile(values, 97.5)), rel=1e-9)


def test_weights_come_in_blocks_and_sum_to_the_number_of_documents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bootstrap, "_WEIGHTS_AT_ONCE", 70)
    blocks = list(bootstrap.multinomial_weights(7, 25, 0))
    assert [len(block) for block in blocks] == [10, 10, 5]
    assert (np.concatenate(blocks).sum(axis=1) == 7).all()


def test_intervals_hold_the_true_value_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = generator.exponential(size=(60, 1))
        (interval,) = bootstrap.intervals(
            np.concatenate([np.ones((60, 1)), values], axis=1),
            np.zeros((60, 1)),
            lambda table, _: {"mean": table[:, 1] / table[:, 0]},
            resamples=200,
            seed=trial,
        ).values()
        hits += interval[0] <= 1.0 <= interval[1]
    assert 0.87 <= hits / 200 <= 0.99


def test_one_document_has_no_interval_and_neither_has_an_undefined_ratio():
    assert set(bootstrap.intervals(*sums_of(1), summary, resamples=20).values()) == {None}
    table, shifted = sums_of(5)
    table[:, column_names(VARIANTS).index("zero.ce")] = table[:, 3]
    found = bootstrap.intervals(table, shifted, summary, resamples=20)
    assert found["loss_recovered"] is None
    assert found["l0"] == pytest.approx((5.0, 5.0))


def test_more_documents_than_groups_share_them():
    groups = bootstrap.DocumentGroups(3)
    assert groups.of(np.array([9, 9, 4, 7])).tolist() == [0, 0, 1, 2]
    assert groups.of(np.array([5, 4])).tolist() == [0, 1]
    assert (len(groups), groups.used) == (4, 3)


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(200, 12, generator=generator, dtype=torch.float64)
        @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
        + 3
    )


@pytest.fixture
def reference(rows: torch.Tensor) -> Reference:
    mean = rows.mean(dim=0)
    centred = rows - mean
    norms = rows.norm(dim=1)
    return Reference(
        mean=mean,
        mean_norm=norms.mean().item(),
        median_norm=norms.median().item(),
        exclusion=NOTHING,
        covariance=centred.T @ centred / len(rows),
        sample=rows,
    )


@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_pca_baseline_is_the_truncated_svd(rows: torch.Tensor, reference: Reference, count: int):
    found = baselines.principal_components(reference, count)(Rows(rows, rows, None))
    centred = rows.numpy() - rows.numpy().mean(axis=0)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    expected = u[:, :count] * s[:count] @ v[:count] + rows.numpy().mean(axis=0)
    np.testing.assert_allclose(found.x_hat, expected, rtol=1e-6, atol=1e-6)
    assert found.active.tolist() == [count] * 200


def test_random_directions_take_the_largest_and_the_best_scale(rows: torch.Tensor, reference: Reference):
    found = baselines.random_directions(reference, 40, 3)(Rows(rows, rows, None))
    directions = torch.randn(40, 12, generator=torch.Generator().manual_seed(baselines.RANDOM_SEED)).numpy()
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    centred = rows.numpy() - rows.numpy().mean(axis=0)
    raw = np.zeros_like(centred)
    for row, x in enumerate(centred):
        strength = directions @ x
        for feature in np.argsort(-strength)[:3]:
            raw[row] += max(strength[feature], 0) * directions[feature]
    scale = (raw * centred).sum() / (raw**2).sum()
    np.testing.assert_allclose(found.x_hat, scale * raw + rows.numpy().mean(axis=0), rtol=1e-5, atol=1e-5)
    assert found.active.max() == 3


@pytest.mark.parametrize("name", MODELS)
def test_all_neurons_together_are_the_mlp_and_few_of_them_are_the_strongest(name: str, reference: Reference):
    model, point = model_of(name), HookPoint("mlp_out", 1)
    splicer = Splicer(model, point, keep_neurons=True)
    x, _ = splicer.clean({"input_ids": torch.randint(50, (2, 9))})
    given = Rows(x.flatten(0, 1), x.flatten(0, 1), splicer.neurons.flatten(0, 1))
    output = mlp_output(model, point)
    whole = baselines.neurons(reference, output, 10**6)(given)
    torch.testing.assert_close(whole.x_hat, given.x)
    weight = output.weight if isinstance(output, torch.nn.Linear) else output.weight.T
    single = baselines.neurons(reference, output, 1)(given)
    for neurons, x_hat in zip(given.neurons, single.x_hat, strict=True):
        added = neurons[:, None] * weight.T
        best = added[added.norm(dim=1).argmax()]
        torch.testing.assert_close(x_hat, best + output.bias if output.bias is not None else best)


def test_without_an_mlp_the_coordinates_that_differ_most_are_kept(rows: torch.Tensor, reference: Reference):
    found = baselines.neurons(reference, None, 2)(Rows(rows, rows, None))
    kept = (found.x_hat - reference.mean).abs() > 1e-12
    assert (kept.sum(dim=1) == 2).all()
    differences = (rows - reference.mean).abs()
    assert (differences.where(kept, torch.inf).amin(dim=1) >= differences.where(~kept, 0).amax(dim=1)).all()


def test_the_feature_table_names_neighbours_density_and_the_dead(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.relu(torch.randn(50, 9, generator=generator))
    features[:, 4] = 0
    sums = FeatureSums(9, CPU)
    for part in features.split(7):
        sums.add(DenseFeatures(part))
    decoder = torch.randn(9, 5, generator=generator)
    monkeypatch.setattr("components.evaluation.features._ENTRIES_AT_ONCE", 20)
    table = feature_table(sums, decoder, 3).to_pydict()
    assert table["dead"] == [feature == 4 for feature in range(9)]
    assert sums.dead_fraction == pytest.approx(1 / 9)
    for feature in range(9):
        own = features[:, feature].numpy()
        assert table["density"][feature] == pytest.approx((own > 0).mean())
        assert table["max_activation"][feature] == pytest.approx(own.max())
        cosines = {
            other: float(torch.cosine_similarity(decoder[feature], decoder[other], dim=0))
            for other in range(9)
            if other != feature
        }
        expected = sorted(cosines, key=cosines.get, reverse=True)[:3]
        assert table["neighbours"][feature] == expected
        assert table["neighbour_cosines"][feature] == pytest.approx([cosines[other] for other in expected], rel=1e-5)
    assert nearest_rows(decoder, 8)[0].shape == (9, 8)
