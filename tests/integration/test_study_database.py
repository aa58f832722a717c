"""An Optuna study on PostgreSQL that two processes are started for: the one that leads it is killed, and the other goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psycopg2
import pytest
import yaml

pytestmark = pytest.mark.integration

TRIALS = 3


@pytest.fixture
def database(postgres: str) -> str:
    """One of its own: Optuna's tables have a name in common with MLflow's."""
    connection = psycopg2.connect(postgres.replace("+psycopg2", ""))
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE optuna")
    connection.close()
    return postgres.rsplit("/", 1)[0] + "/optuna"


def trials_of(database: str) -> list[optuna.trial.FrozenTrial]:
    names = optuna.get_all_study_names(database)
    return optuna.load_study(study_name=names[0], storage=database).trials if names else []


def test_the_leader_of_a_study_is_killed_and_the_other_process_goes_on(tiny_tree: dict, tmp_path: Path, database: str):
    tiny_tree["sae"] = {"architecture": "batchtopk", "d_sae": 64, "k": 4}
    tiny_tree["training"] |= {"tokens": 3_000}
    tiny_tree["evaluation"] = {"tokens": 500, "baselines": []}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_tree))
    command = [
        str(Path(sys.executable).parent / "sae"), "sweep", str(config), "--space", "training.learning_rate=1e-3..1e-2:log",
        "--trials", str(TRIALS), "--together", "2", "--study-storage", database, "--json",
    ]  # fmt: skip
    processes = []
    for name in ("first", "second"):
        with (tmp_path / name).open("w") as log:
            started = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ), start_new_session=True
            )
        processes.append(started)
    try:
        while not (before := [trial for trial in trials_of(database) if trial.state.is_finished()]):
            assert all(process.poll() is None for process in processes), (tmp_path / "first").read_text()
            time.sleep(0.1)
        logs = [(tmp_path / name).read_text() for name in ("first", "second")]
        leader = 0 if "in lockstep" in logs[0] else 1
        assert "in lockstep" not in logs[1 - leader], "both lead"
        os.killpg(processes[leader].pid, signal.SIGKILL)
        found, _ = processes[1 - leader].communicate()
        assert processes[1 - leader].returncode == 0, (tmp_path / ("second", "first")[leader]).read_text()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record = json.loads(found)
    after = trials_of(database)
    assert [trial.state.name for trial in after] == ["COMPLETE"] * TRIALS
    assert [trial.value for trial in after] == [point["loss"] for point in record["points"]]
    for trial in before:
        assert (after[trial.number].params, after[trial.number].datetime_complete) == (trial.params, trial.datetime_complete)
