"""Tracking and registry against a real MLflow server on PostgreSQL with artifacts on S3, also when it dies in the middle."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from components import steps
from components.registry.gates import Gates
from components.registry.history import Ledger, champion_version
from components.registry.promotion import promote, rollback
from components.registry.records import Outcome
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.tracking.runs import tracked_run
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect

pytestmark = pytest.mark.integration


def line(tree: dict, sparsity_coefficient: float = 5.0, **training) -> tuple[Specification, Outcome]:
    """From the corpus to the registry, without Prefect."""
    sae = {**tree["sae"], "sparsity_coefficient": sparsity_coefficient}
    plan = resolve(parse_config({**tree, "sae": sae, "training": {**tree["training"], **training}}))
    steps.extract(plan)
    with steps.tracked(plan, {}) as run:
        steps.train(plan, run.add_points)
        steps.evaluate(plan)
        return plan, steps.register(plan, run)


@pytest.fixture
def tree(tiny_tree: dict, s3: str, mlflow_server, tmp_path: Path) -> dict:
    tiny_tree["storage"]["root"] = f"{s3}/{tmp_path.name}"
    tiny_tree["tracking"] |= {"uri": mlflow_server.uri, "registered_model": tmp_path.name, "system_metrics_seconds": 1}
    return tiny_tree


def no_run_is_left_running(client: MlflowClient) -> bool:
    experiment = client.get_experiment_by_name("sae-foundry").experiment_id
    return not client.search_runs([experiment], "attributes.status = 'RUNNING'")


def test_the_whole_line_with_promotions_and_rollback(tree: dict, mlflow_server):
    plan, first = line(tree, learning_rate=1e-2, sparsity_coefficient=500.0)
    _, better = line(tree, learning_rate=1e-2, sparsity_coefficient=0.1)
    client, name = connect(plan.config.tracking, plan.config.storage.root), plan.registered_model
    assert (first.alias, first.model_version) == ("champion", 1)
    run = client.get_run(first.mlflow_run)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert len(client.get_metric_history(first.mlflow_run, "train/loss")) == len(plan.training_record().curves)
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    answer = model.predict(np.ones((2, 32), np.float32))
    assert answer["features"].shape == (2, 64)
    wanted = "2" if better.alias == "champion" else "1"
    assert champion_version(client, name) == wanted
    promote(client, name, "2", Gates(evaluation_tokens=1), force="to roll it back")
    assert rollback(client, name, "a test")[0].version == "1"
    assert champion_version(client, name) == "1"
    assert no_run_is_left_running(client)


def test_twenty_runs_at_once_lose_nothing(mlflow_server):
    settings = TrackingSettings(uri=mlflow_server.uri, experiment="crowd", patience_seconds=120)

    def work(worker: int) -> str:
        with tracked_run(settings, "unused", f"run-{worker}", f"crowd-{worker}", {"worker": worker}, {}) as run:
            for start in range(1, 501, 50):
                run.add_points(points(start, 50))
                time.sleep(0.05)
            return run.run_id

    with ThreadPoolExecutor(20) as threads:
        runs = list(threads.map(work, range(20)))
    client = connect(settings, "unused")
    assert len(set(runs)) == 20
    for worker, run_id in enumerate(runs):
        run = client.get_run(run_id)
        assert (run.info.status, run.data.params["worker"]) == ("FINISHED", str(worker))
        steps_logged = [metric.step for metric in client.get_metric_history(run_id, "train/loss")]
        assert sorted(steps_logged) == list(range(1, 501))


def test_killed_and_restarted_in_the_middle_the_server_has_everything_and_nothing_half(tree: dict, mlflow_server):
    """It dies three times: in training, and twice while the model is being registered."""
    tree["training"]["log_tokens"] = 256
    plan = resolve(parse_config(tree))
    steps.extract(plan)
    deaths: list[float] = []
    done = threading.Event()

    def disturb() -> None:
        for pause in (1.0, 2.5, 2.0):
            if done.wait(pause):
                return
            mlflow_server.kill()
            deaths.append(time.monotonic())
            time.sleep(1.0)
            mlflow_server.start()

    killer = threading.Thread(target=disturb)
    killer.start()
    try:
        _, outcome = line(tree)
    finally:
        done.set()
        killer.join()
    if mlflow_server.process is None:
        mlflow_server.start()
    assert len(deaths) >= 2
    client = connect(plan.config.tracking, plan.config.storage.root)
    run = client.get_run(outcome.mlflow_run)
    assert run.info.status == "FINISHED"
    curves = plan.training_record().curves
    for name in ("loss", "l0", "dead_fraction"):
        history = client.get_metric_history(outcome.mlflow_run, f"train/{name}")
        assert sorted((metric.step, metric.value) for metric in history) == [(int(p["tokens"]), p[name]) for p in curves]
    measured = {name: value for name, value in plan.evaluation_record().metrics.items() if isinstance(value, (int, float))}
    assert {name: run.data.metrics[f"eval/{name}"] for name in measured} == pytest.approx(measured)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{outcome.mlflow_run}'")
    assert [model.status for model in models if model.status == LoggedModelStatus.READY] == [LoggedModelStatus.READY]
    versions = client.search_model_versions(f"name = '{plan.registered_model}'")
    assert [(version.status, version.tags["sae.registered"]) for version in versions] == [("READY", "true")]
    assert mlflow.pyfunc.load_model(f"models:/{plan.registered_model}@champion") is not None
    with steps.tracked(plan, {}):
        pass
    assert no_run_is_left_running(client)


def test_racing_promotions_over_http_leave_one_champion_and_a_reader_sees_only_whole_versions(tree: dict, mlflow_server):
    plan, _ = line(tree, learning_rate=1e-2, sparsity_coefficient=5.0)
    line(tree, learning_rate=1e-2, sparsity_coefficient=50.0)
    client, name = connect(plan.config.tracking, plan.config.storage.root), plan.registered_model
    before = len(Ledger(client, name).entries())
    gates = Gates(evaluation_tokens=1)
    stop, failures, reads = threading.Event(), [], [0]

    def read() -> None:
        while not stop.is_set():
            try:
                version = client.get_model_version_by_alias(name, "champion")
                assert version.status == "READY"
                if reads[0] % 10 == 0:
                    answer = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(np.ones((1, 32), np.float32))
                    assert np.isfinite(answer["reconstruction"]).all()
                reads[0] += 1
            except Exception as error:  # gathered and shown by the test's own thread
                failures.append(error)

    def promoter(which: int) -> int:
        promoted = 0
        for turn in range(25):
            decision = promote(client, name, "12"[(turn + which) % 2], gates, force=f"turn {turn} of {which}")
            promoted += decision.entry is not None
        return promoted

    with ThreadPoolExecutor(3) as threads:
        reader = threads.submit(read)
        turns = list(threads.map(promoter, (0, 1)))
        stop.set()
        reader.result()
    assert failures == []
    assert reads[0] > 10
    assert turns == [25, 25]
    entries = Ledger(client, name).entries()
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    assert len(entries) > before
    assert champion_version(client, name) == entries[-1].version


def points(start: int, count: int) -> list[dict[str, float]]:
    return [{"tokens": float(step), "loss": 1 / step, "l0": float(step)} for step in range(start, start + count)]


def test_while_the_server_is_away_training_does_not_wait_and_no_point_is_lost(mlflow_server):
    settings = TrackingSettings(uri=mlflow_server.uri, patience_seconds=120, system_metrics_seconds=0.5)
    with tracked_run(settings, "unused", "away", "away", {}, {}) as run:
        run.add_points(points(1, 150))
        run.flush()
        mlflow_server.kill()
        started = time.monotonic()
        for start in range(151, 1151, 10):
            run.add_points(points(start, 10))
            time.sleep(0.02)
        assert time.monotonic() - started < 100 * 0.02 + 1.0
        mlflow_server.start()
    history = run.client.get_metric_history(run.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(1, 1151))
    assert len(run.client.get_metric_history(run.run_id, "train/l0")) == 1150
    assert run.client.get_run(run.run_id).info.status == "FINISHED"
    assert any(name.startswith("system/") for name in run.client.get_run(run.run_id).data.metrics)


def test_an_error_is_not_hidden_by_a_server_that_is_away_and_the_run_is_closed_later(
    mlflow_server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("components.tracking.runs._CLOSING_SECONDS", 2.0)
    settings = TrackingSettings(uri=mlflow_server.uri)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="the disk is full"):
        with tracked_run(settings, "unused", "lost", "lost", {}, {}) as run:
            run.add_points(points(1, 10))
            mlflow_server.kill()
            raise RuntimeError("the disk is full")
    assert time.monotonic() - started < 15
    mlflow_server.start()
    assert run.client.get_run(run.run_id).info.status in ("RUNNING", "FAILED")
    with tracked_run(settings, "unused", "next", "next", {}, {}):
        closed = run.client.get_run(run.run_id)
    assert closed.info.status == "FAILED"
    assert closed.data.tags["sae.failure"]
