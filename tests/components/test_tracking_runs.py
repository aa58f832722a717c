"""The life of an MLflow run: closed with the reason whatever ends its process, and no metric lost while a server is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from components.tracking import liveness
from components.tracking.buffer import MetricBuffer
from components.tracking.runs import PARENT_TAG, tracked_run
from components.tracking.settings import FLOW_RUN_TAG, TrackingSettings
from components.tracking.store import connect

WORK = """
import sys, time
from components.tracking.runs import tracked_run
from components.tracking.settings import FLOW_RUN_TAG, TrackingSettings
root, digest = sys.argv[1:3]
with tracked_run(TrackingSettings(), root, "work", digest, {"a": 1}, {}) as run:
    run.add_points([{"tokens": 10.0, "loss": 1.0}])
    print("open", flush=True)
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("runs"))
    connect(TrackingSettings(), folder)
    return folder


def stopped(root: str, digest: str, number: signal.Signals) -> tuple[int, MlflowClient, str]:
    """A process with an open run gets the signal; its exit code, a client and the run."""
    process = subprocess.Popen([sys.executable, "-c", WORK, root, digest], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    process.send_signal(number)
    process.wait(timeout=120)
    client = connect(TrackingSettings(), root)
    experiment = client.get_experiment_by_name("sae-foundry").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`sae.run_digest` = '{digest}'")
    return process.returncode, client, run.info.run_id


def test_sigterm_closes_the_run_with_the_reason_and_its_metrics(root: str):
    code, client, run_id = stopped(root, "term", signal.SIGTERM)
    run = client.get_run(run_id)
    assert code == 143
    assert run.info.status == "FAILED"
    assert run.data.tags["sae.failure"].startswith("SIGTERM")
    assert run.data.metrics["train/loss"] == 1.0


def test_after_kill_9_the_next_run_of_any_pipeline_closes_it_and_its_own_continues_it(root: str):
    code, client, run_id = stopped(root, "kill", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert client.get_run(run_id).info.status == "RUNNING"
    with tracked_run(TrackingSettings(), root, "other", "another", {}, {}) as other:
        dead = client.get_run(run_id)
        assert dead.info.status == "FAILED"
        assert "ended without a word" in dead.data.tags["sae.failure"]
        assert client.get_run(other.run_id).info.status == "RUNNING"
        with tracked_run(TrackingSettings(), root, "third", "third", {}, {}):
            pass
        assert client.get_run(other.run_id).info.status == "RUNNING"  # it lives, in this very process
    with tracked_run(TrackingSettings(), root, "work", "kill", {}, {}) as again:
        assert again.run_id == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert "sae.failure" not in client.get_run(run_id).data.tags


def test_a_run_that_ends_while_another_looks_for_dead_ones_stays_finished(root: str, monkeypatch: pytest.MonkeyPatch):
    ending = tracked_run(TrackingSettings(), root, "ending", "ending", {}, {})
    run = ending.__enter__()
    client, search = run.client, MlflowClient.search_runs

    def search_and_wait(*arguments, **named):
        found = search(*arguments, **named)
        ending.__exit__(None, None, None)  # between the search and the look at what it found
        return found

    monkeypatch.setattr(MlflowClient, "search_runs", search_and_wait)
    assert liveness.close_dead_runs(client, run.experiment_id) == []
    monkeypatch.undo()
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_a_run_of_another_host_is_dead_only_after_a_long_silence(root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(liveness, "host_identity", lambda: "elsewhere/boot/1")
    with tracked_run(TrackingSettings(), root, "far", "far", {}, {}) as run:
        monkeypatch.undo()
        found = run.client.get_run(run.run_id)
        assert liveness.cause_of_death(found) is None
        assert liveness.cause_of_death(found, time.time() + 600) is None
        assert "no heartbeat for 20 minutes" in str(liveness.cause_of_death(found, time.time() + 1200))


def test_child_runs_hang_below_their_sweep(root: str):
    with tracked_run(TrackingSettings(), root, "sweep", "sweep", {"lambda": [1, 2]}, {}) as parent:
        for value in (1, 2):
            with tracked_run(TrackingSettings(), root, f"p{value}", f"p{value}", {}, {PARENT_TAG: parent.run_id}) as child:
                child.log_evaluation({"l0": 10.0 * value, "note": None, "broken": float("nan")})
    found = parent.client.search_runs([parent.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert sorted(run.data.metrics["eval/l0"] for run in found) == [10.0, 20.0]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert parent.client.get_run(parent.run_id).info.status == "FINISHED"


def test_a_full_buffer_drops_the_oldest_points_and_the_end_brings_them_back():
    away, sent = [True], []
    forgotten: list[int] = []
    buffer = MetricBuffer(
        send=sent.extend,
        is_reachable=lambda: not away[0],
        on_drop=lambda values: forgotten.append(values[0].step),
        capacity=5,
    )
    buffer.add([[Metric("train/loss", 1.0, 0, step)] for step in range(8)])
    assert forgotten == [0, 1, 2]
    assert not buffer.drain(0.5)
    away[0] = False
    assert buffer.drain(30)
    assert [metric.step for metric in sent] == [3, 4, 5, 6, 7]
    buffer.close()


def test_a_refused_value_is_reported_and_does_not_hold_up_the_others():
    from mlflow.exceptions import MlflowException

    sent: list[Metric] = []

    def send(values: list[Metric]) -> None:
        if values[0].key == "bad key":
            raise MlflowException("no such name", error_code=1000)  # INVALID_PARAMETER_VALUE
        sent.extend(values)

    buffer = MetricBuffer(send=send)
    buffer.add([[Metric("bad key", 1.0, 0, 1)]])
    assert buffer.drain(10)
    assert "no such name" in str(buffer.failure)
    buffer.add([[Metric("good", 1.0, 0, 2)]])
    assert buffer.drain(10)
    assert [metric.key for metric in sent] == ["good"]
    buffer.close()


def test_of_two_processes_that_make_the_same_sae_the_second_waits_for_the_first(root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.2)
    first = subprocess.Popen([sys.executable, "-c", WORK, root, "same"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "open\n"
    opened: list[str] = []

    def second() -> None:
        with tracked_run(TrackingSettings(), root, "work", "same", {}, {}) as run:
            opened.append(run.run_id)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(timeout=4)
    assert thread.is_alive()
    assert opened == []
    first.kill()
    first.wait()
    thread.join(timeout=30)
    client = connect(TrackingSettings(), root)
    experiment = client.get_experiment_by_name("sae-foundry").experiment_id
    (run,) = client.search_runs([experiment], "tags.`sae.run_digest` = 'same'")
    assert opened == [run.info.run_id]
    assert run.info.status == "FINISHED"


def test_a_program_that_is_started_afterwards_is_not_sent_to_our_store(root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/of-the-user.db")
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    connect(TrackingSettings(uri=f"sqlite:///{root}/ours.db"), root)
    variables = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") and name.endswith("_URI")}
    assert variables == {"MLFLOW_TRACKING_URI": "sqlite:////nowhere/of-the-user.db"}


def test_a_flow_run_that_is_started_again_does_not_wait_for_itself(root: str):
    tags = {FLOW_RUN_TAG: "b2c5"}
    client = connect(TrackingSettings(), root)
    experiment = client.get_experiment_by_name("sae-foundry").experiment_id
    # on another machine, which died a second ago
    elsewhere = {liveness.HOST_TAG: "node/1/2", liveness.PROCESS_TAG: "7@1.00", liveness.HEARTBEAT_TAG: f"{time.time():.0f}"}
    client.create_run(experiment, tags={**tags, **elsewhere, "sae.run_digest": "again"})
    started = time.monotonic()
    with tracked_run(TrackingSettings(), root, "work", "again", {}, tags) as run:
        assert time.monotonic() - started < liveness.LOOK_SECONDS
        assert client.get_run(run.run_id).info.status == "RUNNING"


def test_of_runs_that_were_made_at_the_same_moment_one_stays(root: str):
    def work(number: int) -> str:
        with tracked_run(TrackingSettings(), root, "work", "moment", {}, {"number": str(number)}) as run:
            return run.run_id

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(work, range(4)))
    assert len(found) == 1


def test_the_commit_is_the_one_that_the_run_was_resolved_with(root: str):
    begun = {"mlflow.source.git.commit": "a" * 40, "sae.git_dirty": "false"}
    with tracked_run(TrackingSettings(), root, "work", "commit", {}, {}, code=begun) as run:
        assert run.code == begun
    tags = connect(TrackingSettings(), root).get_run(run.run_id).data.tags
    assert tags["mlflow.source.git.commit"] == "a" * 40


def test_a_secret_of_an_error_a_parameter_or_a_tag_is_not_stored(root: str):
    address = "postgresql://u:pl4nted@host/db?password=pl4nted"
    with pytest.raises(RuntimeError) as raised:
        with tracked_run(TrackingSettings(), root, "secret", "secret", {"source": address}, {}) as run:
            run.set_tags({"where": address})
            raise RuntimeError(f"cannot reach {address}")
    data = connect(TrackingSettings(), root).get_run(run.run_id).data
    hidden = "postgresql://host/db?password=***"
    assert data.params["source"] == data.tags["where"] == hidden
    assert data.tags["sae.failure"] == f"RuntimeError: cannot reach {hidden}" == f"RuntimeError: {raised.value}"


def test_no_two_system_samples_of_a_failed_and_continued_run_have_one_step(root: str):
    settings = TrackingSettings(system_metrics_seconds=0.4)
    for _ in range(2):
        with pytest.raises(FloatingPointError), tracked_run(settings, root, "diverged", "diverged", {}, {}) as run:
            time.sleep(1.5)
            raise FloatingPointError("the loss is nan")
    client = connect(settings, root)
    names = [name for name in client.get_run(run.run_id).data.metrics if name.startswith("system/")]
    assert names
    for name in names:
        sampled = [metric.step for metric in client.get_metric_history(run.run_id, name)]
        assert len(sampled) >= 2
        assert len(set(sampled)) == len(sampled)
