"""What a later step would stop at is said before the first one begins."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from components import steps
from components.run import late_checks
from components.run.checks import check
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError


def changed(tree: dict, **fields: object) -> dict:
    """The tree with `section__field=value` set."""
    for name, value in fields.items():
        section, _, field = name.partition("__")
        tree = tree | ({section: tree.get(section, {}) | {field: value}} if field else {section: value})
    return tree


def refusal(tree: dict) -> str:
    with pytest.raises(UserError) as refused:
        check(resolve(parse_config(tree)))
    return str(refused.value)


def test_gates_that_are_no_file_are_refused_before_anything_is_made(tiny_tree: dict, tmp_path: Path):
    assert "tracking.gates: cannot read '/no/gates.yaml'" in refusal(changed(tiny_tree, tracking__gates="/no/gates.yaml"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("evaluation_tokenz: 5\n")
    assert "there is no gate 'evaluation_tokenz'" in refusal(changed(tiny_tree, tracking__gates=str(wrong)))
    # What reads no gates is not stopped by them.
    check(resolve(parse_config(changed(tiny_tree, tracking__gates="/no/gates.yaml"))), only_data=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "n" * 300}, "name: 'nnn"),
        ({"rerun": "r" * 300}, "rerun: 'rrr"),
        ({"tracking__experiment": "e" * 300}, "tracking.experiment: 'eee"),
        ({"tracking__registered_model": "m" * 300}, "tracking.registered_model: it makes the registered name 'mmm"),
        ({"tracking__purpose": "p" * 300}, "tracking.purpose: it makes the registered name"),
        ({"sae__d_sae": 2**40}, "sae.d_sae: it gives 1099511627776 features"),
        ({"sae": {"expansion_factor": 1e14}}, "sae.expansion_factor: it gives"),
        ({"storage__cache": "s3://bucket/cache"}, "storage.cache: 's3://bucket/cache' is not on this machine"),
        ({"storage__cache": "/proc/none"}, "storage.cache: cannot write to '/proc/none'"),
        ({"corpus__context_length": 2}, "corpus.context_length: 2 leaves no token"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_later_step_could_not_use_is_refused_by_name(tiny_tree: dict, fields: dict, said: str):
    assert said in refusal(changed(tiny_tree, **fields))


def test_names_of_the_greatest_length_have_folders_and_a_registered_name(tiny_tree: dict):
    plan = resolve(parse_config(changed(tiny_tree, name="n" * 128, tracking__purpose="p" * 64)))
    check(plan)
    assert steps.prepare_tokens(plan).splits["train"].tokens > 0


def test_a_runner_whose_package_is_missing_is_refused_at_once(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(late_checks, "find_spec", lambda name: None if name == "prefect_ray" else find_spec(name))
    assert "execution.runner: 'ray' needs the package prefect_ray" in refusal(changed(tiny_tree, execution__runner="ray"))


@pytest.mark.parametrize(("bos", "length"), [("sequence", 3), ("none", 2)])
def test_the_shortest_sequences_that_are_accepted_are_evaluated(tiny_tree: dict, bos: str, length: int):
    tree = changed(tiny_tree, corpus__context_length=length, corpus__bos=bos, corpus__train_tokens=1000)
    tree = changed(tree, corpus__held_out_tokens=200, training__tokens=1024, evaluation__baselines=[])
    plan = resolve(parse_config(tree))
    check(plan)
    for step in (steps.prepare_tokens, steps.extract, steps.train, steps.evaluate):
        step(plan)
    assert plan.evaluation_record() is not None
