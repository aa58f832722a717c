"""An evaluation in spans, by workers that share nothing but what is sent to them, is that of one worker."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from comparing import assert_same

from components import steps
from components.activations.exclusion import NOTHING
from components.evaluation import kept, measurements, spliced_pass
from components.evaluation.held_out import HeldOut
from components.evaluation.intervals import DocumentGroups
from components.evaluation.job import batch_size, spans
from components.evaluation.measurements import baseline_spans, sae_spans
from components.evaluation.record import EvaluationRecord
from components.evaluation.results import active_features
from components.evaluation.span_totals import SpanSums, merged
from components.run.config import parse_config
from components.run.specification import Specification, resolve

CPU = torch.device("cpu")


def trained(tree: dict, **evaluation) -> Specification:
    tree["training"]["tokens"] = 3_000
    tree["evaluation"] = {"tokens": 1_001, "reference_tokens": 1_000, "baseline_tokens": 450, **evaluation}
    plan = resolve(parse_config(tree))
    steps.extract(plan)
    steps.train(plan)
    return plan


def sent(value):
    return pickle.loads(pickle.dumps(value))


def by_spans(plan: Specification, parts: int) -> tuple[EvaluationRecord, dict, list[SpanSums]]:
    """Record, feature table, and what each span of the SAE's pass gave."""
    work = sent(steps.evaluation_job(plan))
    settings = work.settings
    reference = sent(steps.evaluation_reference(work, CPU))
    passes = [
        sent(steps.measure_span(work, reference.mean, reference.exclusion, CPU, span))
        for span in sae_spans(settings, work.text, parts)
    ]
    measured = merged(passes)
    l0 = active_features(settings, measured)
    compared = [
        sent(steps.measure_baselines(work, reference, l0, CPU, span)) for span in baseline_spans(settings, work.text, parts)
    ]
    assert len(passes) == parts
    record = steps.finish_evaluation(plan, measured, merged(compared) if compared else None)
    return record, pq.read_table(Path(plan.sae_url) / "features.parquet").to_pydict(), passes


@pytest.mark.parametrize("packing", ["crossing", "within_document"])
def test_the_number_of_spans_changes_no_result(tiny_tree: dict, packing: str):
    tiny_tree["corpus"]["packing"] = packing
    plan = trained(tiny_tree)
    alone = steps.evaluate(plan)
    table = pq.read_table(Path(plan.sae_url) / "features.parquet").to_pydict()
    for parts in (1, 2, 3):
        record, features, passes = by_spans(plan, parts)
        assert_same(record.model_dump(), alone.model_dump())
        assert_same(features, table)
        cut = [set(a.documents.tolist()) & set(b.documents.tolist()) for a, b in pairwise(passes)]
        assert all(len(documents) == 1 for documents in cut), "every cut is within a document"
    assert alone.metrics["evaluation_tokens"] == 1_001
    assert alone.metrics["loss_recovered_low"] is not None


def test_documents_that_share_a_group_share_it_in_every_division(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    tiny_tree["activations"]["exclude"] = {"norms_above": 1.02}
    plan = trained(tiny_tree, tokens=1_400, baselines=[])
    monkeypatch.setattr(DocumentGroups.__init__, "__defaults__", (2, False))
    alone = steps.evaluate(plan)
    assert alone.metrics["evaluation_documents"] > 4
    assert alone.metrics["evaluation_tokens"] < 1_400
    for parts in (2, 3):
        assert_same(by_spans(plan, parts)[0].model_dump(), alone.model_dump())


def test_groups_of_spans_are_those_of_the_whole():
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(1, 5, size=generator.integers(1, 30))
        ids = np.repeat(generator.permutation(1_000)[: len(lengths)], lengths)
        whole = DocumentGroups(4)
        expected = whole.of(ids)
        numbering = DocumentGroups(4)
        found = []
        for part in np.split(ids, np.sort(generator.integers(0, len(ids) + 1, size=2))):
            rows = DocumentGroups(4, first_alone=True)
            groups = rows.of(part)
            opened = numbering.of(rows.documents)[: rows.used]
            found.append(opened[groups])
        assert np.concatenate(found).tolist() == expected.tolist()
        assert (len(numbering), numbering.used) == (len(whole), whole.used)


@pytest.mark.parametrize("tokens", [1, 137, 1_001, 10**9])
@pytest.mark.parametrize("parts", [2, 3, 7, 1_000])
def test_spans_cover_the_text_once_in_the_batches_of_one_worker(tiny_tree: dict, tokens: int, parts: int):
    plan = resolve(parse_config(tiny_tree))
    text = HeldOut(url=plan.token_url, manifest=steps.prepare_tokens(plan))
    batch = batch_size(16, 3)
    found = spans(text, tokens, batch, parts)
    (whole,) = spans(text, tokens, batch, 1)

    def batches(span):
        part = type(text)(url=text.url, manifest=text.manifest, sequences=span.sequences)
        return [(block.tokens.tolist(), block.documents.tolist()) for block in part.batches(span.tokens, batch)]

    assert [block for span in found for block in batches(span)] == batches(whole)
    assert sum(span.tokens for span in found) == min(tokens, text.tokens)
    assert len(found) <= parts
    lengths = [len(span.sequences) for span in found]
    assert max(lengths) - min(lengths) < 2 * batch


@pytest.mark.parametrize("by_workers", [False, True])
def test_an_interrupted_evaluation_keeps_the_spans_that_are_done(
    by_workers: bool, tiny_tree: dict, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kept, "TOKENS", 200)
    plan = trained(tiny_tree)
    measured: list[str] = []
    measure = spliced_pass.measure

    def interrupted_at(number: int) -> None:
        def counting(measurement, text, span, *others):
            if len(measured) == number:
                raise KeyboardInterrupt
            measured.append(f"{others[-1]} {span.sequences}")
            return measure(measurement, text, span, *others)

        monkeypatch.setattr(measurements, "measure", counting)

    def evaluated() -> EvaluationRecord:
        return by_spans(plan, kept.parts(1_001, 1))[0] if by_workers else steps.evaluate(plan)

    for number in (3, 8):  # in the middle of either pass
        interrupted_at(number)
        with pytest.raises(KeyboardInterrupt):
            evaluated()
    interrupted_at(-1)
    record = evaluated()
    assert len(measured) == len(set(measured)) > 8  # nothing was measured twice
    folder = Path(plan.config.storage.root) / "evaluations"
    assert not list(folder.glob("*.spans"))
    (Path(plan.sae_url) / "evaluation.json").unlink()
    monkeypatch.setattr(kept, "TOKENS", 100_000)
    assert_same(record.model_dump(), steps.evaluate(plan).model_dump())


def test_a_damaged_span_is_measured_again(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    plan = trained(tiny_tree, baselines=[])
    job = steps.evaluation_job(plan)
    (span,) = sae_spans(job.settings, job.text, 1)
    mean = steps.evaluation_reference(job, CPU).mean
    first = steps.measure_span(job, mean, NOTHING, CPU, span)
    (path,) = Path(job.kept_url).iterdir()
    path.write_bytes(path.read_bytes()[:-200])
    again = steps.measure_span(job, mean, NOTHING, CPU, span)
    assert np.array_equal(first.by_document.table, again.by_document.table)
    assert np.array_equal(first.features.fired, again.features.fired)
