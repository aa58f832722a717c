"""What is trained again, and what is left alone."""

from __future__ import annotations

import time
from copy import deepcopy
from pathlib import Path

import pytest

from components import steps
from components.run import identity
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.run.staleness import verdict
from components.sae.architectures.relu import ReLUSettings


def plan_of(tree: dict, **changes) -> Specification:
    tree = deepcopy(tree)
    for field, value in changes.items():
        part, _, name = field.partition("__")
        if name:
            tree[part][name] = value
        else:
            tree[part] = value
    return resolve(parse_config(tree))


def registered(plan: Specification) -> dict:
    steps.extract(plan)
    with steps.tracked(plan, {}) as run:
        steps.train(plan, run.add_points)
        steps.evaluate(plan)
        return steps.register(plan, run)


@pytest.fixture
def corpus(tmp_path: Path, text_corpus: str) -> Path:
    """A copy that a test may add to."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for path in Path(text_corpus).iterdir():
        (folder / path.name).write_text(path.read_text())
    return folder


@pytest.fixture
def tree(tiny_tree: dict, corpus: Path) -> dict:
    tiny_tree["corpus"]["paths"] = [str(corpus)]
    return tiny_tree


def test_only_what_changed_something_is_stale_and_the_reason_names_it(
    tree: dict, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    first = verdict(plan_of(tree))
    assert first.stale
    assert "there is no registry yet" in first.reason
    registered(plan_of(tree))

    unchanged = verdict(plan_of(tree))
    assert not unchanged.stale
    assert unchanged.reason.startswith("nothing to do: version 1 of ")
    assert unchanged.standing is not None
    assert unchanged.standing.model_version == 1
    assert unchanged.standing.alias == "champion"
    # where and how it is run decides nothing
    assert not verdict(plan_of(tree, execution={"workers": 2}, evaluation__batch_sequences=3)).stale
    assert not verdict(plan_of(tree, training__checkpoint_tokens=8_000)).stale

    changed = verdict(plan_of(tree, sae__sparsity_coefficient=7.5))
    assert changed.stale
    assert changed.rerun is None
    assert "the configuration changed since version 1" in changed.reason
    assert "sae.sparsity_coefficient 5.0 -> 7.5" in changed.reason
    other = verdict(plan_of(tree, name="other"))
    assert other.stale
    assert "'other' has no version" in other.reason

    old = verdict(plan_of(tree), max_age_days=2, now=time.time() + 3 * 86400)
    assert old.stale
    assert old.rerun == "retrain+after-1"
    assert "3.0 days old, more than 2" in old.reason
    assert not verdict(plan_of(tree), max_age_days=2, now=time.time() + 86400).stale

    forced = verdict(plan_of(tree), force="2026-11-24")
    assert forced.stale
    assert forced.rerun == "retrain+forced-2026-11-24"
    worded = verdict(plan_of(tree, rerun="again"))  # the user's own word is a change of the configuration
    assert worded.stale
    assert worded.rerun == "again"
    assert "rerun None -> again" in worded.reason
    assert verdict(plan_of(tree, rerun="again"), force="x").rerun == "again+forced-x"

    (corpus / "new.txt").write_text("a document that was not there before " * 40)
    snapshot = verdict(plan_of(tree))
    assert snapshot.stale
    assert "the corpus changed since version 1" in snapshot.reason
    (corpus / "new.txt").unlink()

    with monkeypatch.context() as patch:
        patch.setitem(identity.VERSIONS, "evaluation", 99)
        recipe = verdict(plan_of(tree))
        assert recipe.stale
        assert "the recipe or the metrics have another version since version 1" in recipe.reason
    with monkeypatch.context() as patch:
        patch.setattr(ReLUSettings, "version", 99)
        assert verdict(plan_of(tree)).stale


def test_a_repetition_trains_anew_on_the_same_activations_and_settles_the_matter(tree: dict):
    first = plan_of(tree)
    registered(first)
    due = verdict(plan_of(tree), force="again")
    again = plan_of(tree, rerun=due.rerun)
    assert again.dataset_digest == first.dataset_digest
    assert again.sae_digest != first.sae_digest
    outcome = registered(again)
    assert outcome.model_version == 2
    assert outcome.alias == "challenger"  # equal weights are no improvement
    settled = verdict(plan_of(tree))
    assert not settled.stale
    assert settled.standing is not None
    assert settled.standing.model_version == 2
    assert settled.standing.alias == "challenger"  # and whoever asks again hears of the refusal again


def test_a_configuration_that_comes_back_is_not_stale(tree: dict):
    registered(plan_of(tree))
    registered(plan_of(tree, sae__sparsity_coefficient=7.5))
    assert not verdict(plan_of(tree)).stale


def test_a_recipe_that_comes_back_is_not_stale_for_ever(tree: dict, monkeypatch: pytest.MonkeyPatch):
    """Two workers with different checkouts, say."""
    registered(plan_of(tree))
    with monkeypatch.context() as patch:
        patch.setattr(ReLUSettings, "version", 99)
        assert verdict(plan_of(tree)).stale
        registered(plan_of(tree))
        assert not verdict(plan_of(tree)).stale
    assert not verdict(plan_of(tree)).stale
