"""A sweep as its user meets it: what may vary, children as if alone, failures marked, killed and continued."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from components import steps, storage
from components.interop.saelens import load_saelens
from components.run.config import parse_config
from components.run.estimate import dense_flops, sparse_flops, training_memory
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.sweeps import sweep as sweeps
from components.sweeps.grid import children, parse_grid
from components.sweeps.groups import lockstep_groups
from components.sweeps.record import load_sweep, read_sweep
from components.sweeps.sparsity import advise, decoder_cosine
from components.sweeps.work import in_a_process, point_of
from components.tracking.runs import PARENT_TAG
from components.tracking.store import connect
from components.training.loop import train_together
from components.training.process import TrainingTimeout


@pytest.fixture
def base(tiny_tree: dict) -> Specification:
    tiny_tree["sae"] = {"architecture": "batchtopk", "expansion_factor": 2, "k": 4}
    tiny_tree["training"] |= {"tokens": 8_000, "learning_rate": 4e-3}
    tiny_tree["evaluation"] = {"tokens": 500, "baselines": []}
    return resolve(parse_config(tiny_tree))


def here(groups, give_up):
    """Lockstep in this process: what is tested is not how it is started."""
    for group in groups:
        jobs = [child.run.training() for child in group]
        yield group, train_together(jobs, group[0].run.device, lambda place, points, of=group: give_up(of[place], points))


def nothing(groups, give_up):
    raise AssertionError(f"nothing was to be trained, and {[child.title for group in groups for child in group]} was")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["corpus.context_length=16,32"], ["corpus.context_length", "one activation dataset", "sae and training"]),
        (["activations.hook_points=[resid_post.0],[resid_post.1]"], ["activations.hook_points", "one activation dataset"]),
        (["seed=0,1"], ["seed", "one activation dataset"]),
        (["evaluation.tokens=100,200"], ["evaluation.tokens", "measured"]),
        (["sae.kk=3,4"], ["sae.kk", "did you mean 'k'"]),
        (["training.tokens=many"], ["training.tokens", "many"]),
        (["sae.d_sae=8", "sae.expansion_factor=2"], ["d_sae", "expansion_factor", "give one"]),
        (["sae.k=4,4.0"], ["k 4", "same training"]),
        (["sae.k"], ["--grid", "sae.k=8,12,20"]),
        (["sae.k=4", "sae.k=8"], ["--grid", "sae.k", "twice"]),
        (["sae.k=" + ",".join(map(str, range(1, 1200)))], ["1,199 children", "1,000"]),
        (["sae.architecture=batchtopk,relu", "sae.k=2,4"], ["sae.k", "no such field"]),
    ],
)
def test_what_cannot_vary_is_refused_in_one_sentence(base: Specification, arguments: list[str], parts: list[str]):
    with pytest.raises(UserError) as error:
        children(base, parse_grid(arguments))
    for part in parts:
        assert part in str(error.value)


def test_a_child_is_the_run_that_its_configuration_would_be_alone(base: Specification, tiny_tree: dict):
    found = children(base, parse_grid(["sae.d_sae=64,96", "training.learning_rate=1e-3,4e-3"]))
    assert [list(child.values.values()) for child in found] == [[64, 1e-3], [64, 4e-3], [96, 1e-3], [96, 4e-3]]
    tiny_tree["sae"] = {"architecture": "batchtopk", "d_sae": 96, "k": 4}
    tiny_tree["training"]["learning_rate"] = 1e-3
    assert found[2].run == resolve(parse_config(tiny_tree))


def test_another_architecture_brings_its_own_defaults(base: Specification, tiny_tree: dict):
    _, relu = children(base, parse_grid(["sae.architecture=batchtopk,relu"]))
    tiny_tree["sae"] = {"architecture": "relu", "expansion_factor": 2}
    assert relu.run.sae_digest == resolve(parse_config(tiny_tree)).sae_digest


def test_groups_share_batches_and_fit_into_memory(base: Specification):
    found = children(base, parse_grid(["training.batch_size=128,256", "sae.d_sae=32,64,128,4096", "training.tokens=4000,8000"]))
    coder, window = training_memory(next(child.run for child in found if child.run.d_sae == 128), 6_000)
    limit = window + 3 * coder
    planned = lockstep_groups(found, 6_000, limit)
    assert {child.run.d_sae for child, _ in planned.too_large} == {4096}
    assert all("sae.d_sae (4,096)" in reason for _, reason in planned.too_large)
    together = [child.run.sae_digest for group in planned.groups for child in group]
    assert sorted(together) == sorted(child.run.sae_digest for child in found if child.run.d_sae != 4096)
    for group in planned.groups:
        assert len({child.run.config.training.batch_size for child in group}) == 1
        assert window + sum(training_memory(child.run, 6_000)[0] for child in group) <= limit
    assert len(planned.groups) < len(together)


def test_flops_are_counted_product_by_product(base: Specification):
    n, d, f = 8_192, 32, 64  # whole steps of 256: x W_enc, f W_dec; then dW_enc, dW_dec, df
    assert dense_flops(base) == 2 * n * d * f * (1 + 1 + 1 + 1 + 1)
    assert sparse_flops(base, 4.0) == 2 * n * (d * f + d * 4 * (1 + 1 + 1 + 1))


def test_a_sweep_measures_each_child_as_it_would_be_alone_and_is_found_again(base: Specification, tiny_tree: dict):
    grid = parse_grid(["sae.k=2,4"])
    url, record = sweeps.sweep(base, grid, train=here)
    assert [point.status for point in record.points] == ["finished"] * 2
    assert read_sweep(url) == record == load_sweep(url)
    for point, child in zip(record.points, children(base, grid), strict=True):
        alone = steps.evaluate(child.run).metrics
        assert point.l0 == alone["l0"]
        assert point.loss == 1 - alone["explained_variance"]
        assert point.tokens == 256 * point.steps
        assert point.flops_dense == dense_flops(child.run)
        rows = load_saelens(Path(child.run.sae_url), torch.device("cpu")).W_dec
        assert point.decoder_cosine == pytest.approx(decoder_cosine(rows))
    client = connect(base.config.tracking, base.config.storage.root)
    runs = client.search_runs([client.get_run(record.mlflow_run).info.experiment_id])
    parents = {run.info.run_id: run.data.tags.get(PARENT_TAG) for run in runs}
    assert parents == {record.mlflow_run: None, **{point.mlflow_run: record.mlflow_run for point in record.points}}
    assert client.get_run(record.points[0].mlflow_run).data.metrics["eval/l0"] == record.points[0].l0
    assert {"sweep.json", "pareto.png", "sweep.html"} <= {file.path for file in client.list_artifacts(record.mlflow_run)}
    assert sweeps.sweep(base, grid, train=nothing) == (url, record)
    # another sweep that holds the same trainings: they are reused, in child runs of its own
    _, other = sweeps.sweep(base, parse_grid(["sae.k=4"]), train=nothing)
    assert {point.sae_digest for point in other.points} < {point.sae_digest for point in record.points}
    assert not {point.mlflow_run for point in other.points} & {point.mlflow_run for point in record.points}


def test_a_child_that_diverges_or_does_not_fit_is_marked_and_the_others_complete(base: Specification):
    grid = parse_grid(["training.learning_rate=4e-3,1e14", "sae.d_sae=32,2048"])
    small, large = (training_memory(child.run, 6_000) for child in children(base, grid)[:2])
    assert small[0] * 2 + small[1] < large[0] + large[1]
    _, record = sweeps.sweep(base, grid, memory_bytes=small[0] * 2 + small[1], train=here)
    found = {(point.features, point.learning_rate): point for point in record.points}
    assert found[32, 4e-3].status == "finished"
    assert found[32, 1e14].status == "diverged"
    assert "training.learning_rate" in str(found[32, 1e14].reason)
    assert found[2048, 4e-3].status == "failed"
    assert "sae.d_sae (2,048)" in str(found[2048, 4e-3].reason)
    client = connect(base.config.tracking, base.config.storage.root)
    run = client.get_run(found[32, 1e14].mlflow_run)
    assert run.info.status == "FAILED"
    assert "diverged" in run.data.tags["sae.failure"]
    assert client.get_run(record.mlflow_run).info.status == "FINISHED"

    # again: what diverged diverges again and is left alone; what memory forbade is done where there is memory now
    trained: list[str] = []

    def watched(groups, give_up):
        trained.extend(child.title for group in groups for child in group)
        return here(groups, give_up)

    _, again = sweeps.sweep(base, {**grid}, memory_bytes=10**9, train=watched)
    assert trained == ["learning_rate 0.004, d_sae 2048", "learning_rate 100000000000000, d_sae 2048"]
    assert [point.status for point in again.points] == ["finished", "finished", "diverged", "diverged"]


def test_one_whose_process_is_killed_is_marked_and_the_others_are_trained_in_halves(base: Specification):
    grid = parse_grid(["sae.k=2,3,4"])
    attempts: list[int] = []

    def killed_by_the_second(groups, give_up):
        for group in groups:
            attempts.append(len(group))
            if any(child.values["sae.k"] == 3 for child in group):
                yield group, RuntimeError("the training process was killed (SIGKILL), by hand or because memory ran out")
            else:
                yield from here([group], give_up)

    _, record = sweeps.sweep(base, grid, train=killed_by_the_second)
    assert attempts == [3, 1, 2, 1, 1]
    assert [point.status for point in record.points] == ["finished", "failed", "finished"]
    assert "SIGKILL" in str(record.points[1].reason)


def test_one_that_cannot_be_measured_is_marked_and_the_others_are_measured_alone(base, monkeypatch: pytest.MonkeyPatch):
    evaluate, asked = steps.evaluate_together, []

    def refused(runs):
        asked.append([run.config.sae.k for run in runs])
        if 3 in asked[-1]:
            raise RuntimeError("CUDA out of memory")
        return evaluate(runs)

    monkeypatch.setattr(steps, "evaluate_together", refused)
    _, record = sweeps.sweep(base, parse_grid(["sae.k=2,3,4"]), train=here)
    assert asked == [[2, 3, 4], [2], [3], [4]]
    assert [(point.status, point.reason) for point in record.points] == [
        ("finished", None), ("failed", "CUDA out of memory"), ("finished", None)
    ]  # fmt: skip


def test_a_group_that_takes_too_long_is_not_tried_again_in_parts(base: Specification):
    tried: list[int] = []

    def too_slow(groups, give_up):
        for group in groups:
            tried.append(len(group))
            yield group, TrainingTimeout("training took more than 1 minutes; it continues from its checkpoint")

    _, record = sweeps.sweep(base, parse_grid(["sae.k=2,4"]), train=too_slow)
    assert tried == [2]
    assert {(point.status, str(point.reason)[:28]) for point in record.points} == {("failed", "training took more than 1 mi")}
    _, record = sweeps.sweep(base, parse_grid(["sae.k=2,4"]), train=here)
    assert [point.status for point in record.points] == ["finished"] * 2


def test_killed_between_two_children_it_goes_on_with_the_second(base: Specification, monkeypatch: pytest.MonkeyPatch):
    grid = parse_grid(["sae.k=2,4"])
    log, calls = steps.log_results, []

    def killed_at_the_second(run: Specification, open_run):
        calls.append(run.sae_digest)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return log(run, open_run)

    monkeypatch.setattr(steps, "log_results", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sweeps.sweep(base, grid, train=here)
    before = read_sweep(sweeps.sweep_url(base, grid))
    assert before is not None
    assert [point.status for point in before.points] == ["finished", "waiting"]
    _, record = sweeps.sweep(base, grid, train=nothing)  # both are trained
    assert len(calls) == 3
    assert [point.status for point in record.points] == ["finished", "finished"]
    assert record.points[0] == before.points[0]
    assert record.mlflow_run == before.mlflow_run


def test_lockstep_in_a_process_of_its_own_gives_the_same_weights(base: Specification, tmp_path: Path):
    steps.extract(base)
    pair = children(base, parse_grid(["training.tokens=2000,4000"]))
    outcomes = in_a_process(pair)
    kept = [outcome.weights_sha256 for outcome in outcomes]  # type: ignore[union-attr]
    for child in pair:
        storage.delete(child.run.sae_url)
    assert [steps.train(child.run).weights_sha256 for child in pair] == kept


def test_decoder_rows_are_compared_pair_by_pair():
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    pairs = [abs(torch.cosine_similarity(a.double(), b.double(), dim=0)) for a, b in itertools.combinations(rows, 2)]
    assert decoder_cosine(rows) == pytest.approx(float(sum(pairs)) / len(pairs))
    assert decoder_cosine(torch.eye(64)) == 0
    assert decoder_cosine(torch.ones(5000, 2)) == pytest.approx(1)  # of which 4,096 are compared
    assert decoder_cosine(rows[:1]) == 0


@pytest.mark.parametrize(("cosines", "k", "at_the_end"), [([0.3, 0.1, 0.2], 4, False), ([0.1, 0.2, 0.3], 2, True)])
def test_the_l0_to_choose_is_that_of_the_least_alike_rows(base: Specification, cosines: list[float], k: int, at_the_end: bool):
    points = []
    for child in children(base, parse_grid(["sae.d_sae=32,64", "sae.k=2,4,8"])):
        cosine = 0.0 if child.run.d_sae == 32 else cosines[len(points) % 3]
        found = {"loss": 0.1, "l0": child.values["sae.k"] + 0.5, "decoder_cosine": cosine}
        points.append(point_of(child, "finished").model_copy(update=found))
    advice = advise(points)
    assert advice is not None
    assert (advice.features, advice.k, advice.l0, advice.at_the_end) == (64, k, k + 0.5, at_the_end)
    assert advise(points[:5]) is None


def test_what_is_no_sweep_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"sae sweep"):
        load_sweep(str(tmp_path))
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        load_sweep(str(tmp_path / "sweep.json"))
