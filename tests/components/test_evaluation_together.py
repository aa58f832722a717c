"""SAEs that are measured together are measured as each is alone, and the language model is run once for what they share."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from comparing import assert_same

from components import steps, storage
from components.evaluation import evaluate as evaluation
from components.evaluation.record import EvaluationRecord
from components.evaluation.splicing import Splicer
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.sweeps.grid import children, parse_grid


def trained(tree: dict, *grid: str) -> list[Specification]:
    tree["sae"] = {"architecture": "batchtopk", "expansion_factor": 2, "k": 4}
    tree["training"]["tokens"] = 2_000
    tree["evaluation"] = {"tokens": 500, "reference_tokens": 500, "baseline_tokens": 250}
    base = resolve(parse_config(tree))
    steps.extract(base)
    runs = [child.run for child in children(base, parse_grid(grid))]
    for run in runs:
        steps.train(run)
    return runs


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Sequences of every clean pass through the language model, and variants of every spliced one."""
    seen, variants = list[int](), list[int]()
    clean, spliced = Splicer.clean, Splicer.spliced

    def counted(self, tokens):
        seen.append(len(tokens))
        return clean(self, tokens)

    def watched(self, activations):
        variants.append(len(activations))
        return spliced(self, activations)

    monkeypatch.setattr(Splicer, "clean", counted)
    monkeypatch.setattr(Splicer, "spliced", watched)
    return seen, variants


FLOAT32 = {"rel": 2e-5, "abs": 2e-6}
"""Which other batches round otherwise."""


def results(record: EvaluationRecord, run: Specification) -> dict:
    features = pq.read_table(Path(run.sae_url) / "features.parquet").to_pydict()
    return {**record.model_dump(include={"digest", "metrics", "breakdown", "baselines"}), "features": features}


def test_each_is_measured_as_alone_with_as_many_clean_passes_as_for_one(tiny_tree: dict, passes: tuple[list[int], list[int]]):
    runs = trained(tiny_tree, "sae.d_sae=64,96", "sae.k=2,6")
    together = [results(record, run) for record, run in zip(steps.evaluate_together(runs), runs, strict=True)]
    clean, variants = passes
    for_all = sum(clean)
    for run, found in list(zip(runs, together, strict=True))[1:3]:
        storage.delete(f"{run.sae_url}/evaluation.json")
        clean.clear()
        assert_same(found, results(steps.evaluate(run), run), run.sae_digest, **FLOAT32)
        assert sum(clean) == for_all
    assert len({found["metrics"]["l0"] for found in together}) == 4
    assert max(variants) == 6, "as much memory as for one: an SAE and the five that it is compared with"


def test_what_is_there_stays_and_a_kill_before_the_baselines_repeats_no_sae(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    runs = trained(tiny_tree, "sae.k=2,4")
    first = steps.evaluate(runs[1])
    written = Path(runs[1].sae_url, "evaluation.json").stat().st_mtime_ns

    def killed(*_):
        raise KeyboardInterrupt

    def again(*_):
        raise AssertionError("the SAEs were measured already")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "measure_all_baselines", killed)
        steps.evaluate_together(runs)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measure_saes", again)
        found = steps.evaluate_together(runs)
    assert found[1] == first
    assert Path(runs[1].sae_url, "evaluation.json").stat().st_mtime_ns == written
    assert [run.evaluation_record() for run in runs] == found


def test_a_crosscoder_is_measured_together_hook_point_by_hook_point(tiny_tree: dict):
    tiny_tree["activations"]["hook_points"] = ["resid_post.0", "resid_post.1"]
    tiny_tree["training"]["crosscoder"] = ["resid_post.0", "resid_post.1"]
    runs = trained(tiny_tree, "sae.k=2,4")
    together = [results(record, run) for record, run in zip(steps.evaluate_together(runs), runs, strict=True)]
    storage.delete(f"{runs[1].sae_url}/evaluation.json")
    assert_same(together[1], results(steps.evaluate(runs[1]), runs[1]), "crosscoder", **FLOAT32)
