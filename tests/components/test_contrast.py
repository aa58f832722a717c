"""Features that tell texts apart: what is said of them is true, and luck is not taken for a finding."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from components.interpretation import contrast, safety, search
from components.interpretation.prompt_sets import (
    PromptSet,
    load_harmless,
    load_parallel,
    load_sets,
    shipped_sets,
)
from components.language_model.hook_points import parse_hook_point
from components.language_model.loading import load_encoder, load_model
from components.language_model.settings import LanguageModelSettings
from components.language_model.source import find_model
from components.sae.features import DenseFeatures
from components.settings import UserError

CPU = torch.device("cpu")
WORDS = ("raise", "import", "return")


class Planted:
    """A coder that somebody wrote by hand: row 5, 6 and 7 read and write the planted directions, the others random ones."""

    def __init__(self, directions: torch.Tensor) -> None:
        random = torch.randn(64, directions.shape[1], generator=torch.Generator().manual_seed(3))
        self.W_dec = torch.nn.functional.normalize(random, dim=1)
        self.W_dec[5:8] = directions
        self.bias = torch.full((64,), -1.0)

    def reconstruct(self, x: torch.Tensor) -> tuple[DenseFeatures, torch.Tensor]:
        found = torch.relu(x @ self.W_dec.T + self.bias)
        return DenseFeatures(found), found @ self.W_dec


@pytest.fixture(scope="module")
def synthetic(tiny_model: str):
    """A model in which three words carry a direction of their own, and a coder that has them among others."""
    source = find_model(LanguageModelSettings(name=tiny_model))
    model, encoder = load_model(source, CPU), load_encoder(source)
    directions = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)))[0].T
    embedding = model.get_input_embeddings().weight
    for word, direction in zip(WORDS, directions, strict=True):
        (token,) = encoder.encode([f" {word}"])[0]
        embedding[token] += 12 * direction
    return model, encoder, Planted(directions)


def of_word(word: str, without: str, pairs: int = 18) -> PromptSet:
    random = np.random.default_rng(len(word))
    fillers = ["the", "value", "of", "line", "self", "name", "text", "path", "key", "file"]

    def pair(number: int) -> dict[str, str]:
        some = [str(one) for one in random.choice(fillers, 4)]
        first, second = " ".join(some[:2]), " ".join(some[2:])
        return {"text": f"{number} {first} {word} {second}", "against": f"{number} {first} {without} {second}"}

    return PromptSet(name=word, about=word, pairs=tuple(pair(number) for number in range(pairs)))


def test_the_planted_feature_is_found_first(synthetic):
    model, encoder, coder = synthetic
    for number, word in enumerate(WORDS):
        prompts = of_word(word, "pass")
        texts, positive, _ = safety.sides(prompts)
        ids = [list(one) for one in encoder.encode(texts)]
        values, places = search.largest(model, [parse_hook_point("resid_post.0")], coder, ids, encoder.bos, CPU)
        tokens = search.firing(model, [parse_hook_point("resid_post.0")], coder, ids, encoder.bos, CPU)
        assert int(search.contrast(tokens[::2], tokens[1::2]).argmax()) == 5 + number
        first, *others = safety.chosen(prompts, values, 10)
        assert first.feature == 5 + number
        assert (first.held_out.auroc, first.hits.share, first.false_alarms.share) == (1.0, 1.0, 0.0)
        assert contrast.holm([one.held_out.p for one in (first, *others)])[0] < 0.01
        (token,) = encoder.encode([f" {word}"])[0]
        assert {ids[row][places[row, first.feature]] for row in np.flatnonzero(positive)} == {token}
        assert safety.found_by_chance(prompts, values, 10, 10).count <= 2


def test_of_many_random_features_none_is_found():
    random = np.random.default_rng(0)
    pairs, found = 18, 0
    prompts = PromptSet(name="a", about="a", pairs=tuple({"text": f"a{n}", "against": f"b{n}"} for n in range(pairs)))
    for _ in range(40):
        values = np.maximum(random.standard_normal((2 * pairs, 3_000)).astype(np.float32), 0)
        some = safety.chosen(prompts, values, 5)
        assert max(one.chosen_auroc for one in some) > 0.85  # luck, where they were chosen
        found += min(contrast.holm([one.held_out.p for one in some])) < 0.05
    assert found <= 6  # 2 of 40 are to be expected


def test_areas_are_the_share_of_pairs_in_the_right_order():
    random = np.random.default_rng(1)
    values, positive = random.integers(0, 4, (23, 6)).astype(np.float32), random.random(23) < 0.4
    for feature, found in enumerate(contrast.aurocs(values, positive)):
        ones, zeros = values[positive, feature], values[~positive, feature]
        pairs = [(a > b) + (a == b) / 2 for a in ones for b in zeros]
        assert found == pytest.approx(np.mean(pairs), abs=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Normal activations, 1 apart: the area is Phi(1 / sqrt 2), the difference 1."""
    random, positive = np.random.default_rng(2), np.arange(20) < 10
    inside = np.zeros(2)
    for _ in range(400):
        found = contrast.effect(random.standard_normal(20) + positive, positive)
        inside += [found.auroc_low <= 0.7602 <= found.auroc_high, found.difference_low <= 1.0 <= found.difference_high]
    assert ((inside / 400 > 0.92) & (inside / 400 < 0.985)).all(), inside / 400
    low, high = contrast.auroc_interval(1.0, 9, 9)
    assert 0.6 < low < 0.9
    assert high == 1.0
    assert contrast.auroc_interval(0.0, 9, 9) == pytest.approx((0.0, 1 - low))


def test_rates_thresholds_and_corrections_are_those_of_the_book():
    found = contrast.rate(np.arange(10) < 1)  # Wilson's interval of 1 in 10
    assert (found.low, found.high) == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert contrast.rate(np.zeros(0, bool)).high == 1.0
    assert contrast.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    values, positive = np.array([0, 0, 1, 3, 5, 6], np.float32), np.array([0, 0, 0, 1, 1, 1], bool)
    assert contrast.best_threshold(values, positive) == 2.0
    nothing = contrast.effect(np.zeros(6), positive)
    assert (nothing.auroc, nothing.difference, nothing.p) == (0.5, 0.0, 1.0)
    assert contrast.effect(positive * 1.0, positive).difference is None  # nothing varies on either side


def test_every_set_that_ships_is_whole_and_told_apart():
    sets = load_sets([], "--prompts")
    assert {one.name for one in sets} == set(shipped_sets()) >= {"bias", "code_vulnerabilities", "sycophancy"}
    for one in sets:
        assert len(one.pairs) >= 16
        lengths = [len(pair.text) / len(pair.against) for pair in one.pairs]
        assert 0.8 < np.median(lengths) < 1.25  # a longer text has larger maxima
    assert len(load_harmless().texts) >= 40
    parallel = load_parallel(None, "--prompts")
    assert len(parallel.meanings) * len(parallel.languages) >= 100


PAIRS = [{"text": f"a{number}", "against": f"b{number}"} for number in range(8)]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"name": "x", "about": "y", "pairs": PAIRS[:3]}, "pairs Tuple should have at least 8 items"),
        ({"name": "x", "about": "y", "pairs": [*PAIRS, {"text": "a"}]}, "pairs.8.against Field required"),
        ({"name": "x", "about": "y", "pairs": [*PAIRS, {"text": "a1", "against": "c"}]}, "pairs.8: 'a1' stands in pairs.1"),
        ({"name": "../x", "about": "y", "pairs": PAIRS}, "name String should match"),
        ({"name": "x", "about": "y", "pairs": PAIRS, "pears": 1}, "pears Extra inputs are not permitted"),
        (["a"], "holds a list; accepted is a mapping with name, about, pairs"),
        ("a: [", "is not YAML"),
        ({"name": "bias", "about": "y", "pairs": PAIRS}, "two sets are named 'bias'"),
    ],
)
def test_a_set_that_does_not_fit_is_one_clear_sentence(tree: object, said: str, tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    with pytest.raises(UserError, match=re.escape(said)):
        load_sets(["bias", str(path)], "--prompts")
    with pytest.raises(UserError, match="--prompts: there is no file 'no-such' and no such set; there are bias"):
        load_sets(["no-such"], "--prompts")
    path.write_text(yaml.safe_dump({"name": "x", "about": "y", "languages": list("abcd"), "meanings": [{"a": "b"}] * 4}))
    with pytest.raises(UserError, match=re.escape("meanings.0: holds a; accepted is a text in each of a, b, c, d")):
        load_parallel(str(path), "--prompts")
