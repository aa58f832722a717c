"""Features found by direction, attribution and ablation; steering that does what the logits say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from components import steps
from components.interpretation.attribution import ablation, attribution, spearman
from components.interpretation.logits import logit_effects
from components.interpretation.steering import clamped
from components.language_model.hook_points import parse_hook_point, spliced_logits
from components.language_model.loading import load_encoder, load_model
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.steps.evaluation import own_sae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> Specification:
    tree = tiny_tree_in(tmp_path_factory.mktemp("found"))
    tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baselines": []}
    run = resolve(parse_config(tree))
    for step in (steps.extract, steps.train, steps.evaluate):
        step(run)
    return run


IDS = [0, 17, 905, 33, 2048, 77, 410]


def test_attribution_is_the_derivative_by_how_much_of_a_feature_there_is(plan: Specification):
    model, sae = load_model(plan.source, CPU).double(), own_sae(plan.sae_url, CPU).double()
    values, found = attribution(model, plan.point, sae, IDS, 1, 5, 9, CPU)
    assert not found[0].any()  # that of the beginning does not count
    firing = (found.amax(dim=0) > 0).nonzero()[:, 0].tolist()
    assert len(firing) > 5
    for feature in firing[:8]:
        added = (found[:, feature].double()[:, None] * sae.W_dec[feature])[None]

        def difference(amount: float, added: torch.Tensor = added) -> float:
            logits = spliced_logits(model, plan.point, lambda x: x + amount * added, torch.tensor([IDS]))[0, -1]
            return float(logits[5] - logits[9])

        # the model's norms round to float32 whatever its weights are: a smaller step would measure that
        slope = (8 * (difference(0.02) - difference(-0.02)) - (difference(0.04) - difference(-0.04))) / (12 * 0.02)
        assert values[feature].item() == pytest.approx(slope, rel=1e-3, abs=2e-4)
        taken = ablation(model, plan.point, sae, IDS, 1, 5, 9, [feature], CPU)
        assert taken.item() == pytest.approx(difference(0.0) - difference(-1.0), rel=1e-3, abs=1e-4)


def test_both_orders_agree_where_little_comes_after(plan: Specification):
    model, sae = load_model(plan.source, CPU), own_sae(plan.sae_url, CPU)
    last = parse_hook_point("resid_post.2")
    values, found = attribution(model, last, sae, IDS, 1, 5, None, CPU)
    firing = (found.amax(dim=0) > 0).nonzero()[:, 0].tolist()
    several = ablation(model, last, sae, IDS, 1, 5, None, firing, CPU)
    assert spearman(values[firing], several) > 0.9
    one_by_one = torch.cat([ablation(model, last, sae, IDS, 1, 5, None, [feature], CPU) for feature in firing])
    torch.testing.assert_close(several, one_by_one, rtol=1e-4, atol=1e-5)


def test_half_way_it_is_the_integral_along_each_ablation(plan: Specification):
    model, sae = load_model(plan.source, CPU).double(), own_sae(plan.sae_url, CPU).double()
    plain, found = attribution(model, plan.point, sae, IDS, 1, 5, 9, CPU)
    firing = (found.amax(dim=0) > 0).nonzero()[:, 0].tolist()
    each, _ = attribution(model, plan.point, sae, IDS, 1, 5, 9, CPU, passes=len(firing))
    for feature in firing[:4]:
        added = (found[:, feature].double()[:, None] * sae.W_dec[feature])[None]

        def difference(amount: float, added: torch.Tensor = added) -> float:
            logits = spliced_logits(model, plan.point, lambda x: x - amount * added, torch.tensor([IDS]))[0, -1]
            return float(logits[5] - logits[9])

        slope = (8 * (difference(0.48) - difference(0.52)) - (difference(0.46) - difference(0.54))) / (12 * 0.02)
        assert each[feature].item() == pytest.approx(slope, rel=1e-3, abs=2e-4)
    effects = ablation(model, plan.point, sae, IDS, 1, 5, 9, firing, CPU)
    some, _ = attribution(model, plan.point, sae, IDS, 1, 5, 9, CPU, passes=8)
    agreements = [spearman(values[firing], effects) for values in (plain, some, each)]
    assert agreements[2] > 0.98
    assert agreements[1] > agreements[0] or agreements[0] > 0.98


def test_the_command_ranks_by_what_it_says(plan: Specification):
    encoder = load_encoder(plan.source)
    token = next(text for text in (" in", " the", "self") if len(encoder.encode([text])[0]) == 1)
    found = steps.attribute(plan, "the feature fires where", token, None, 6, True, 8)
    effects = [row["ablation"] for row in found["features"]]
    assert effects == sorted(effects, reverse=True)
    assert -1 <= found["spearman"] <= 1
    quick = steps.attribute(plan, "the feature fires where", token, token, 6, False, 0)
    assert all(row["attribution"] == 0 and row["ablation"] is None for row in quick["features"])
    for changes, said in (
        ({"token": "no such single token"}, "--token: 'no such single token' is"),
        ({"prompt": ""}, "--prompt: 0 tokens are not accepted"),
        ({"prompt": "a " * 300}, "--prompt: "),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            steps.attribute(
                plan, **{"prompt": "a", "token": token, "other": None, "limit": 3, "ablate": False, "passes": 0, **changes}
            )


def test_a_direction_finds_the_feature_that_writes_it(plan: Specification, tmp_path: Path):
    rows = own_sae(plan.sae_url, CPU).W_dec.detach().numpy()
    path = tmp_path / "probe.npy"
    noise = np.random.default_rng(0).standard_normal(rows.shape[1])
    np.save(path, 3 * rows[7] / np.linalg.norm(rows[7]) + 0.1 * noise)
    found = steps.search_direction(plan, path, 5)
    direction = np.load(path)
    cosines = rows @ direction / np.linalg.norm(rows, axis=1) / np.linalg.norm(direction)
    assert [row["feature"] for row in found] == np.argsort(-cosines)[:5].tolist()
    assert found[0]["feature"] == 7
    assert found[0]["cosine"] == pytest.approx(cosines[7], rel=1e-3)
    for wrong in (np.zeros(rows.shape[1]), np.ones(3), np.full(rows.shape[1], np.nan), np.array([{}], dtype=object)):
        np.save(path, wrong, allow_pickle=True)
        with pytest.raises(UserError, match="--direction"):
            steps.search_direction(plan, path, 5)
    path.write_text("no array")
    with pytest.raises(UserError, match=r"--direction: '.*' is no \.npy file"):
        steps.search_direction(plan, path, 5)


def test_the_more_a_feature_is_turned_up_the_likelier_its_tokens(plan: Specification):
    """After the last block, where what it does to the logits is what the logits show."""
    model, sae, last = load_model(plan.source, CPU), own_sae(plan.sae_url, CPU), parse_hook_point("resid_post.2")
    ids, _ = logit_effects(model, last, sae.W_dec, 3)
    tokens = torch.tensor([IDS])
    for feature in range(0, 64, 9):
        probabilities = []
        for value in (0.0, 2.0, 5.0, 10.0):
            logits = spliced_logits(
                model, last, lambda x, value=value, feature=feature: clamped(sae, feature, value * 10)(x, x), tokens
            )[0, 1:]
            probabilities.append(float(logits.softmax(dim=-1)[:, ids[feature, 0]].mean()))
        assert probabilities == sorted(probabilities)
        assert probabilities[-1] > probabilities[0]
