"""The stack under load and under outages, as long as it takes: `make soak`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import pytest
import s3fs
from kills import killed_beside_siblings
from mlflow import MlflowClient
from stack_client import Live, named, trainings

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

OUTAGE_SECONDS = 60


@contextmanager
def most_trainings_at_once() -> Iterator[list[int]]:
    """Counts the training processes of this machine, 20 times a second; the list's last number is the largest count."""
    seen, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            seen.append(max(seen[-1], len(trainings())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_twenty_runs_at_once_complete_one_training_at_a_time(live: Live, tree: dict, mlflow: MlflowClient):
    started = time.monotonic()
    with most_trainings_at_once() as seen:
        runs = [live.submit("pipeline/quickstart", {"config": named(tree, f"many-{number}")}) for number in range(20)]
        for run in runs:
            assert live.wait(run, 1800)["state_type"] == "COMPLETED", live.logs(run)
    print(f"20 runs in {time.monotonic() - started:.0f} s")
    assert seen[-1] == 1
    for number in range(20):
        assert mlflow.get_model_version_by_alias(f"many-{number}", "champion").version == "1"
    logs = "".join(path.read_text(errors="replace") for path in (live.folder / "log").iterdir())
    assert "database is locked" not in logs


def test_an_unchanged_retraining_has_nothing_to_do_within_seconds(live: Live, tree: dict):
    config = named(tree, "unchanged")
    live.wait(live.submit("retrain/ci", {"config": config}), 300)
    found = []
    for _ in range(5):
        run = live.wait(live.submit("retrain/ci", {"config": config}), 300)
        assert run["state"]["name"] == "NothingToDo"
        begun, ended = (datetime.fromisoformat(run[key]) for key in ("created", "end_time"))
        found.append((round((ended - begun).total_seconds(), 1), round(run["total_run_time"], 1)))
    print(f"unchanged retrain, seconds from submission and of them running: {found}")


@pytest.mark.parametrize("service", ["prefect", "mlflow", "s3"])
def test_a_server_that_is_away_for_a_minute_costs_nothing(
    live: Live,
    tree: dict,
    mlflow: MlflowClient,
    bucket: s3fs.S3FileSystem,
    service: str,
):
    """In the middle of extraction and training, of two runs at once."""
    name = f"away-{service}"
    long = {"training__tokens": 2_000_000, "training__checkpoint_tokens": 100_000}
    runs = [live.submit("pipeline/quickstart", {"config": named(tree, f"{name}-{number}", **long)}) for number in range(2)]
    live.until(trainings, 240, lambda: live.logs(runs[0]))
    live.supervisor.stop_service(service)
    time.sleep(OUTAGE_SECONDS)
    live.supervisor.start_service(service)
    for run in runs:
        assert live.wait(run, 900)["state_type"] == "COMPLETED", live.logs(run)
    experiment = mlflow.get_experiment_by_name("sae-foundry").experiment_id
    for number in range(2):
        (found,) = mlflow.search_runs([experiment], f"attributes.run_name LIKE '{name}-{number}:%'")
        assert found.info.status == "FINISHED"
        points = mlflow.get_metric_history(found.info.run_id, "train/loss")
        steps = [point.step for point in points]
        (record,) = bucket.glob(f"{live.stack.storage_root}/saes/{name}-{number}-*/training.json")
        assert sorted(steps) == [point["tokens"] for point in json.loads(bucket.cat_file(record))["curves"]]
        assert mlflow.get_model_version_by_alias(f"{name}-{number}", "champion").version == "1"


def test_a_machine_that_dies_in_training_hands_its_run_to_the_next_worker(live: Live, tree: dict, mlflow: MlflowClient):
    """kill -9 to the worker, the flow run and the training at once: nobody is left to say that the run crashed."""
    long = {"training__tokens": 4_000_000, "training__checkpoint_tokens": 100_000, "training__log_tokens": 100_000}
    run = live.submit("pipeline/quickstart", {"config": named(tree, "machine", **long)})
    live.until(lambda: trainings() and "training-progress" in live.artifacts(run), 240, lambda: live.logs(run))
    time.sleep(5)
    victims = {process.pid: process for process in [*live.processes("worker-gpu"), *trainings()]}
    for process in victims.values():
        os.kill(process.pid, signal.SIGKILL)
    killed = time.monotonic()
    ended = live.wait(run, 900, lambda found: found["state_type"] == "COMPLETED")
    print(f"completed {time.monotonic() - killed:.0f} s after the machine died")
    assert ended["run_count"] == 2
    assert "train: continuing from step" in live.logs(run)
    whole = live.submit("pipeline/quickstart", {"config": named(tree, "whole", **long)})
    assert live.wait(whole, 600)["state_type"] == "COMPLETED"
    first, second = (mlflow.get_model_version_by_alias(name, "champion") for name in ("machine", "whole"))
    assert first.tags["sae.weights_sha256"] == second.tags["sae.weights_sha256"]


def test_many_killed_flow_processes_disturb_no_sibling_and_no_worker(live: Live, tree: dict, mlflow: MlflowClient):
    """20 kills: of four runs, two at a time, five times each, which is as often as a run is started again."""
    for wave in "ab":
        print(killed_beside_siblings(live, tree, mlflow, victims=2, kills=5, name=wave))
