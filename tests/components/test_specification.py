"""A run is resolved once, and what changes in the world meanwhile changes nothing in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from components import steps
from components.corpus import files, listing, tokens
from components.corpus.tokens import read_sequences
from components.run import specification
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from flows.cli import app


@pytest.fixture
def corpus(tmp_path: Path, text_corpus: str) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(text_corpus, tmp_path / "texts"))


@pytest.fixture
def tree(tiny_tree: dict, corpus: Path) -> dict:
    tiny_tree["corpus"]["paths"] = [str(corpus)]
    tiny_tree["training"]["tokens"] = 5_000
    return tiny_tree


def test_a_specification_is_the_same_after_its_way_through_json(tree: dict):
    run = resolve(parse_config(tree))
    again = Specification.from_json(run.to_json())
    assert again == run
    assert (again.sae_url, again.run_digest, again.widths) == (run.sae_url, run.run_digest, run.widths)
    assert again.config.sae == run.config.sae
    assert Specification.from_json(run.to_json()) is again  # parsed once


def test_another_word_of_a_repetition_changes_the_coder_alone(tree: dict):
    run = resolve(parse_config(tree))
    again = run.repeated("again")
    assert (again.token_digest, again.dataset_digest) == (run.token_digest, run.dataset_digest)
    assert again.sae_digest != run.sae_digest
    assert again.repeated(None) == run
    assert resolve(parse_config({**tree, "rerun": "again"})).sae_digest == again.sae_digest


def test_a_file_that_appears_while_a_run_goes_on_changes_nothing_in_it(tree: dict, corpus: Path):
    undisturbed = resolve(parse_config(tree))
    expected = steps.prepare_tokens(undisturbed)
    shutil.rmtree(tree["storage"]["root"])

    run = resolve(parse_config(tree))
    (corpus / "000-appeared.txt").write_text("a document that was not there when the run began " * 50)
    assert steps.prepare_tokens(run).splits == expected.splits
    (corpus / "zzz-appeared.txt").write_text("and another one, later " * 50)
    sent = run.to_json()
    for step in (steps.extract, steps.train, steps.evaluate):
        step(Specification.from_json(sent))
    with steps.tracked(run, {}) as open_run:
        outcome = steps.register(Specification.from_json(sent), open_run)
    assert outcome.model_version == 1
    later = resolve(parse_config(tree))
    assert later.token_digest != run.token_digest  # the next run sees it


@pytest.mark.parametrize("what", ["vanished", "changed"])
def test_a_file_that_a_run_needs_and_that_is_another_one_is_named(tree: dict, corpus: Path, what: str):
    tree["corpus"] |= {"train_tokens": 10**6, "held_out_tokens": 10**6}  # so that every file is read
    run = resolve(parse_config(tree))
    victim = corpus / "007.txt"
    if what == "vanished":
        victim.unlink()
    else:
        victim.write_text("something else")
        os.utime(victim, ns=(1, 1))
    with pytest.raises(UserError, match=rf"corpus\.paths: '.*007\.txt' {what} after this run began"):
        steps.prepare_tokens(run)


def test_a_file_that_appears_while_the_corpus_is_read_is_not_read(tree: dict, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    run = resolve(parse_config(tree))
    read, count = files.read_file, []

    def reading(*arguments):
        if not count:
            (corpus / "late.txt").write_text("late " * 400)
        count.append(arguments[0].name)
        return read(*arguments)

    monkeypatch.setattr("components.corpus.sources.read_file", reading)
    manifest = steps.prepare_tokens(run)
    assert "late.txt" not in count
    assert manifest.documents <= 120
    assert len(read_sequences(run.token_url, manifest, "train", 0, 10**6)) > 0


def test_a_whole_run_lists_the_corpus_once_and_is_specified_once(tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the command, without Prefect's server: what its flow does is called here with what the command hands over."""
    listed, resolved, handed = [], [], []
    find, build = listing.find_files, specification.resolve
    monkeypatch.setattr("components.corpus.sources.find_files", lambda *a: listed.append(a) or find(*a))
    monkeypatch.setattr(specification, "resolve", lambda config: resolved.append(config) or build(config))
    skeletons: list[str] = []
    source = specification.ModelSource
    skeleton = source.__dict__["skeleton"].func
    counted = type(source.__dict__["skeleton"])(lambda self: skeletons.append(self.location) or skeleton(self))
    counted.__set_name__(source, "skeleton")
    monkeypatch.setattr(source, "skeleton", counted)

    def flow(name: str, sent: str) -> dict:
        handed.append(sent)
        for step in (steps.extract, steps.train, steps.evaluate):
            step(Specification.from_json(sent))
        run = Specification.from_json(sent)
        with steps.tracked(run, {}) as open_run:
            outcome = steps.register(run, open_run)
        return steps.summary(run, outcome, {}, reused=False)

    monkeypatch.setattr("flows.pipeline.pipeline_of", flow)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tree))
    result = CliRunner().invoke(app, ["run", str(config), "--json"])
    assert result.exit_code == 0, result.output
    assert (len(listed), len(resolved), len(handed)) == (1, 1, 1)
    assert len(skeletons) == 1
    assert tokens.prepare_tokens is not None
