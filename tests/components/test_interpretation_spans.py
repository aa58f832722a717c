"""Feature data made in spans, by workers that share nothing but what is sent to them, is that of the whole matrix of
activations, to the last bit; so is what a killed pass leaves to the next."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from components import steps, storage
from components.evaluation import kept
from components.evaluation.held_out import HeldOut
from components.interpretation import seen
from components.interpretation.examples import bin_edges, lots
from components.records import put_record
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.steps.interpretation import held_out_pass

CPU = torch.device("cpu")
TABLES = ("examples.parquet", "features.parquet")


@pytest.fixture(scope="module")
def plan(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> Specification:
    tree = tiny_tree_in(tmp_path_factory.mktemp("spans"))
    tree["interpretation"] = {"tokens": 1_300, "examples": 3, "drawn": 10, "logits": 4}
    tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baselines": []}
    run = resolve(parse_config(tree))
    for step in (steps.extract, steps.train, steps.evaluate):
        step(run)
    return run


@pytest.fixture(autouse=True)
def small_pieces(plan: Specification, monkeypatch: pytest.MonkeyPatch):
    """Nothing is there, and batches of four sequences make spans of some hundred tokens."""
    monkeypatch.setattr("components.interpretation.activations._TOKENS_AT_ONCE", 128)
    monkeypatch.setattr(kept, "TOKENS", 300)
    forget(plan)


def forget(plan: Specification) -> None:
    storage.delete(storage.join(plan.sae_url, "interpretation"))


def tables(plan: Specification) -> dict[str, bytes]:
    return {name: Path(plan.sae_url, "interpretation", name).read_bytes() for name in TABLES}


def working(plan: Specification, workers: int) -> Specification:
    execution = plan.config.execution.model_copy(update={"workers": workers})
    evaluation = plan.config.evaluation.model_copy(update={"batch_sequences": workers})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"execution": execution, "evaluation": evaluation})})


def test_feature_data_is_that_of_the_whole_matrix_to_the_last_bit(plan: Specification):
    steps.interpret(plan)
    held_out = held_out_pass(plan, HeldOut(url=plan.token_url, manifest=plan.token_manifest()))
    batches = list(held_out.batches())
    matrix = torch.cat([batch.activations() for batch in batches]).numpy()
    texts = {
        name: np.concatenate([getattr(batch.block, name) for batch in batches]) for name in ("tokens", "documents", "positions")
    }
    rows = pq.read_table(Path(plan.sae_url, "interpretation", "examples.parquet")).to_pylist()
    features = pq.read_table(Path(plan.sae_url, "interpretation", "features.parquet")).to_pylist()
    edges = bin_edges().astype(np.float64)
    for feature in range(plan.d_sae):
        own = matrix[:, :, feature]
        largest, firing = own.max(axis=1), np.argwhere(own > 0)
        expected = [
            (int(number), int(own[number].argmax()))
            for number in np.argsort(-largest, kind="stable")[:3]
            if largest[number] > 0
        ]
        where = tuple(firing.T)
        drawn = lots(
            *(torch.from_numpy(texts[name][where].astype(np.int64)) for name in ("documents", "positions")),
            torch.tensor(feature),
        )
        chosen = firing[drawn.argsort(descending=True).numpy()[:10]]
        chosen = chosen[np.argsort(-own[tuple(chosen.T)], kind="stable")]
        expected += [tuple(place) for place in chosen.tolist()]
        found = [row for row in rows if row["feature"] == feature]
        assert len(found) == len(expected)
        for row, (number, place) in zip(found, expected, strict=True):
            assert row["tokens"] == texts["tokens"][number].tolist()
            assert row["activations"] == own[number].tolist()
            assert (row["activation"], row["place"]) == (own[number, place], place)
            assert (row["document"], row["position"]) == (texts["documents"][number, place], texts["positions"][number, place])
        counted, _ = np.histogram(own[where], bins=edges)
        filled = np.flatnonzero(counted)
        assert features[feature]["histogram"] == (counted[filled[0] : filled[-1] + 1].tolist() if len(filled) else [])
        assert features[feature]["sequences"] == (largest > 0).sum()
    on = (matrix[texts["documents"] >= 0] > 0).astype(np.float64)  # fewer tokens than are sampled, and features than are kept
    both, totals = on.T @ on, on.sum(axis=0)
    for row in features:
        for other, share, overlap in zip(row["together"], row["together_shares"], row["together_overlaps"], strict=True):
            common = both[row["feature"], other]
            assert share == pytest.approx(common / totals[row["feature"]])
            assert overlap == pytest.approx(common / (totals[row["feature"]] + totals[other] - common))


@pytest.mark.parametrize("workers", [2, 3])
def test_spans_workers_and_batches_change_no_byte(plan: Specification, workers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept, "TOKENS", 10**9)
    assert len(steps.interpretation_job(plan).spans) == 1
    record = steps.interpret(plan)
    expected = tables(plan)
    forget(plan)
    monkeypatch.setattr(kept, "TOKENS", 300)
    run = working(plan, workers)
    job = pickle.loads(pickle.dumps(steps.interpretation_job(run)))
    exclusion = steps.interpretation_exclusion(run)
    assert len(job.spans) > workers
    for span in reversed(job.spans):  # in any order
        steps.look_at_span(job, exclusion, CPU, span)
    assert steps.interpretation_job(run) == steps.interpretation_job(run)
    monkeypatch.setattr("components.steps.interpretation._seen", lambda *_: pytest.fail("others have looked"))
    assert steps.interpret(run) == record
    assert tables(plan) == expected
    assert not storage.exists(job.kept_url)
    assert steps.interpretation_job(run) is None


class Killed(BaseException):
    pass


def interrupted(plan: Specification, moment: int, patch: pytest.MonkeyPatch) -> int:
    """Interpret, and stop at that moment: before or after a batch or a file. How many moments there were."""
    passed = 0

    def stopping(function: Callable) -> Callable:
        def stopped(*arguments, **named):
            nonlocal passed
            for step in (None, function, None):
                if step is not None:
                    result = step(*arguments, **named)
                elif passed == moment:
                    raise Killed
                else:
                    passed += 1
            return result

        return stopped

    with patch.context() as inner:
        inner.setattr(seen.Seen, "add", stopping(seen.Seen.add))
        inner.setattr(storage, "put_bytes", stopping(storage.put_bytes))
        inner.setattr("components.interpretation.feature_data.put_record", stopping(put_record))
        inner.setattr("pyarrow.parquet.ParquetWriter.write_table", stopping(pq.ParquetWriter.write_table))
        try:
            steps.interpret(plan)
        except Killed:
            return -1
    return passed


def test_a_pass_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(plan: Specification, monkeypatch: pytest.MonkeyPatch):
    steps.interpret(plan)
    expected = tables(plan)
    forget(plan)
    looked = 0
    add = seen.Seen.add

    def counted(*arguments) -> None:
        nonlocal looked
        looked += 1
        add(*arguments)

    monkeypatch.setattr(seen.Seen, "add", counted)
    for moment in (1, 9, 14, 20, 3, 6):  # of each attempt that goes on from the one before
        assert interrupted(plan, moment, monkeypatch) == -1
    first = looked
    steps.interpret(plan)
    assert tables(plan) == expected
    spans, batches = 5, 11
    assert first < batches + 5 * 3, "spans that were done are not looked at again"
    assert looked < batches + 6 * 3
    forget(plan)
    job = steps.interpretation_job(plan)
    assert len(job.spans) == spans
    steps.look_at_span(job, steps.interpretation_exclusion(plan), CPU, job.spans[2])
    (path,) = Path(job.kept_url).iterdir()
    path.write_bytes(path.read_bytes()[:-50])  # damaged
    steps.interpret(plan)
    assert tables(plan) == expected


_SCRIPT = """
import sys
from pathlib import Path
from components import steps
from components.evaluation import kept
from components.interpretation import activations
from components.run.specification import Specification
activations._TOKENS_AT_ONCE, kept.TOKENS = 128, 300
run = Specification.from_json(Path(sys.argv[1]).read_text())
print("begin", flush=True)
steps.interpret(run)
"""
KILLED_ONCE = (
    *(f"{count} spans" for count in (0, 3, 6, 9, 12, 15, 18)),
    "no span left",
    *("examples.parquet", "interpretation.json"),
)
"""What there must be, at least, when a process is killed; each goes on from what the one before left."""


@pytest.mark.soak
@pytest.mark.timeout(1_800)
def test_killed_ten_times_for_good_it_ends_with_the_same_bytes(
    tiny_tree_in: Callable[[Path], dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tree = tiny_tree_in(tmp_path)
    tree["corpus"] |= {"held_out_tokens": 8_000, "held_out_fraction": 0.5}
    tree["interpretation"] = {"tokens": 8_000, "examples": 3, "drawn": 10, "logits": 4}
    run = resolve(parse_config(tree))
    for step in (steps.extract, steps.train, steps.evaluate):
        step(run)
    job = steps.interpretation_job(run)
    assert job is not None
    assert len(job.spans) > 20
    (tmp_path / "run.json").write_text(run.to_json())

    def begun() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "run.json")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        return process

    def done() -> int:
        return sum(1 for path in Path(job.kept_url).glob("*.npz"))

    def reached(moment: str) -> bool:
        if moment.endswith(("parquet", "json")):
            return Path(run.sae_url, "interpretation", moment).exists()
        return done() >= (len(job.spans) if moment == "no span left" else int(moment.split()[0]))

    assert begun().wait() == 0
    expected = tables(run)
    storage.delete(storage.join(run.sae_url, "interpretation"))
    storage.delete(storage.join(run.sae_url, "browser"))
    seen_then = []
    for moment in KILLED_ONCE:
        process = begun()
        while process.poll() is None and not reached(moment):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, moment
        seen_then.append(done())
    assert not Path(run.sae_url, "browser", "index.html").exists()
    assert begun().wait() == 0
    assert tables(run) == expected
    assert Path(run.sae_url, "browser", "index.html").is_file()
    assert not Path(job.kept_url).exists()
    with capsys.disabled():
        print(f"\n{len(KILLED_ONCE)} kills; spans of {len(job.spans)} that were done then: {seen_then}")
