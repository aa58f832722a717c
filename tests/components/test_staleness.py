"""What is trained again, and what is left alone."""

from __future__ import annotations

import time
from copy import deepcopy
from pathlib import Path

import pytest

from components import steps
from components.registry.gates import Gates
from components.registry.promotion import promote
from components.run import identity
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.run.staleness import MODEL_TAG, due_run, verdict
from components.sae.architectures.relu import ReLUSettings
from components.tracking.store import connect


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


def client_of(run: Specification):
    return connect(run.config.tracking, run.config.storage.root)


def test_it_starts_from_the_champion_where_only_corpus_or_length_changed(tree: dict, corpus: Path):
    first = plan_of(tree)
    registered(first)
    name, one = first.registered_model, f"models:/{first.registered_model}/1"

    def due(**changes) -> Specification:
        run = plan_of(tree, **changes)
        return due_run(run, verdict(run))

    assert due(training__tokens=30_000).start.location == one
    assert due(corpus__train_tokens=5_000).start.location == one
    (corpus / "new.txt").write_text("a document that was not there before " * 40)
    changed = due()
    assert changed.start.location == one
    assert changed.start_said == f"from {one}, the champion"
    assert due(training__tokens=30_000, corpus__train_tokens=5_000).start.location == one
    # anything else beside, and it would go on with what another recipe has made
    for changes in (
        {"sae__sparsity_coefficient": 7.5}, {"training__learning_rate": 1e-4}, {"seed": 3}, {"name": "other"},
        {"training__start_from": "scratch"}, {"sae": {"d_sae": 128}}, {"sae": {"d_sae": 64, "architecture": "jumprelu"}},
    ):  # fmt: skip
        assert due(**changes).start is None, changes
    client = client_of(first)
    client.set_model_version_tag(name, "1", MODEL_TAG, "another language model")
    assert due().start is None
    client.set_model_version_tag(name, "1", MODEL_TAG, first.model_digest)
    client.delete_registered_model_alias(name, "champion")
    assert due().start is None
    (corpus / "new.txt").unlink()
    unchanged = plan_of(tree)
    assert due_run(unchanged, verdict(unchanged, force="x")).start is None


def test_what_was_started_from_the_champion_stands_and_is_repeated_from_there(tree: dict, corpus: Path):
    first = plan_of(tree)
    registered(first)
    name, one = first.registered_model, f"models:/{first.registered_model}/1"
    (corpus / "new.txt").write_text("a document that was not there before " * 40)
    warm = due_run(plan_of(tree), verdict(plan_of(tree)))
    assert registered(warm).model_version == 2
    assert not verdict(plan_of(tree)).stale
    client = client_of(first)
    promote(client, name, "2", Gates(evaluation_tokens=1), force="a test")
    # It is the champion itself now: still nothing to do, and a run that died and is started again finds its own start.
    assert not verdict(plan_of(tree)).stale
    assert plan_of(tree).starting_from("champion", must_fit=True).sae_digest == warm.sae_digest
    repeated = due_run(plan_of(tree), verdict(plan_of(tree), force="x"))
    assert (repeated.start.location, repeated.config.rerun) == (one, "retrain+forced-x")
    old = due_run(plan_of(tree), verdict(plan_of(tree), max_age_days=2, now=time.time() + 3 * 86400))
    assert (old.start.location, old.config.rerun) == (one, "retrain+after-2")
    (corpus / "newer.txt").write_text("and another one " * 80)
    assert due_run(plan_of(tree), verdict(plan_of(tree))).start.location == f"models:/{name}/2"


def test_a_configuration_that_asks_for_the_champion_is_not_stale_because_there_is_another(tree: dict):
    registered(plan_of(tree))
    asking = plan_of(tree, training__start_from="champion", training__tokens=30_000)
    assert verdict(asking).stale
    assert "training.start_from None -> champion" in verdict(asking).reason
    registered(due_run(asking, verdict(asking)))
    client = client_of(asking)
    promote(client, asking.registered_model, "2", Gates(evaluation_tokens=1), force="a test")
    again = plan_of(tree, training__start_from="champion", training__tokens=30_000)
    assert not verdict(again).stale
    assert again.base_digest == asking.base_digest
