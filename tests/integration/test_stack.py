"""The stack that `make stack` starts: deployments, schedules, events, CI, a worker that dies, and no secret anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import s3fs
import yaml
from kills import killed_beside_siblings
from mlflow import MlflowClient
from stack_client import FINAL, NOTIFY_SECRET, Live, named, trainings

from components import steps, storage
from components.run.config import parse_config
from components.run.specification import resolve
from infra.stack import postgres
from infra.stack.settings import REPOSITORY

pytestmark = pytest.mark.integration

SAE = str(Path(sys.executable).parent / "sae")


def test_a_deployment_run_ends_with_a_registered_model_on_s3_and_in_postgresql(
    live: Live, tree: dict, mlflow: MlflowClient, bucket: s3fs.S3FileSystem, tmp_path: Path
):
    parameters = tmp_path / "parameters.json"
    parameters.write_text(json.dumps({"config": named(tree, "line")}))
    command = [Path(sys.executable).parent / "prefect", "deployment", "run", "pipeline/quickstart", "--watch"]
    done = subprocess.run(
        [*command, "--params", parameters.read_text()], env=live.environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (run,) = live.flow_runs("pipeline/quickstart")
    version = mlflow.get_model_version_by_alias("line", "champion")
    assert version.tags["prefect.flow_run_id"] == run["id"]
    assert version.tags["sae.name"] == "line"
    kinds = {path.split("/")[2] for path in bucket.find(f"{live.stack.storage_root}")}
    assert kinds == {"tokens", "activations", "saes"}
    assert any(path.endswith("sae_weights.safetensors") for path in bucket.find("s3://mlflow"))
    with psycopg2.connect(
        host="127.0.0.1", port=live.stack.ports.postgres, user="sae", password=live.stack.secrets.postgres, dbname="mlflow"
    ) as database, database.cursor() as cursor:  # fmt: skip
        cursor.execute("select status from runs where run_uuid = %s", (version.run_id,))
        assert cursor.fetchall() == [("FINISHED",)]

    artifacts = live.artifacts(run["id"])
    assert {"mlflow-run", "model-version", "metrics", "gates"} <= set(artifacts)
    assert f"{live.stack.mlflow_url}/#/experiments/" in artifacts["mlflow-run"]["data"]
    rows = {row["metric"]: row for row in json.loads(artifacts["metrics"]["data"])}
    assert rows["l0"]["this version"] == pytest.approx(float(version.tags["eval.l0"]))
    progress = live.ask("/artifacts/filter", {"artifacts": {"key": {"any_": ["training-progress"]}}})
    assert [found["data"] for found in progress] == [100.0]
    assert "tokens/s" in progress[0]["description"]
    # the logs of the components are the flow run's
    assert "train: " in live.logs(run["id"])


def test_what_follows_a_promotion_is_started_by_its_event(live: Live):
    """The new champion of the test before, as the registry gives it, is measured again."""
    live.until(lambda: live.flow_runs("evaluate/cpu"), 60)
    run = live.flow_runs("evaluate/cpu")[0]
    assert run["parameters"]["sae"] == "models:/line/1"
    assert live.wait(run["id"])["state_type"] == "COMPLETED"


def test_a_new_corpus_starts_its_extraction(live: Live, tree: dict, bucket: s3fs.S3FileSystem):
    live.emit(
        {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": "sae.corpus.changed",
            "resource": {"prefect.resource.id": "sae.corpus.tiny"},
            "payload": {"config": named(tree, "announced")},
        }
    )
    run = live.until(lambda: live.flow_runs("extract/cpu"), 60)[0]
    assert run["parameters"]["config"]["name"] == "announced"
    assert live.wait(run["id"])["state_type"] == "COMPLETED"
    assert bucket.glob(f"{live.stack.storage_root}/activations/announced-*/manifest.json")


@pytest.fixture
def nightly(live: Live, tree: dict, tmp_path: Path) -> Iterator[Path]:
    """A configuration whose nightly retraining comes every minute; the test goes on with something else meanwhile."""
    config = tmp_path / "nightly.yaml"
    config.write_text(yaml.safe_dump(named(tree, "scheduled")))
    deployment = live.deployment("nightly/nightly")["id"]
    live.ask(f"/deployments/{deployment}", {"parameters": {"configs": [str(config)]}}, method="PATCH")
    schedule = {"schedule": {"cron": "* * * * *", "timezone": "Etc/UTC"}, "active": True}
    (made,) = live.ask(f"/deployments/{deployment}/schedules", [schedule])
    yield config
    live.ask(f"/deployments/{deployment}/schedules/{made['id']}", method="DELETE")
    # What is under way must not be taken for the next test's.
    idle = lambda: all(run["state_type"] in (*FINAL, "SCHEDULED") for run in live.flow_runs("nightly/nightly"))  # noqa: E731
    live.until(idle, 120)


def retrain(live: Live, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.ci.retrain", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        env={**live.environment, **environment},
    )  # fmt: skip


def check_ci(live: Live, tree: dict, tmp_path: Path) -> None:
    config, summary = tmp_path / "ci.yaml", tmp_path / "summary.md"
    config.write_text(yaml.safe_dump(named(tree, "ci")))
    passed = retrain(live, str(config), GITHUB_STEP_SUMMARY=str(summary))
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "Promoted" in summary.read_text()
    assert "| l0 |" in summary.read_text()
    idle = retrain(live, str(config))
    assert idle.returncode == 0, idle.stdout
    assert "nothing to do: version 1 of ci" in idle.stdout

    forced = retrain(live, str(config), "--force")
    assert forced.returncode == 1  # equal weights are no improvement
    assert "champion.improvement" in forced.stdout
    # Not 1e30: PostgreSQL gives it back as a whole number over 64 bits, and Prefect's server then fails to list any flow run.
    config.write_text(yaml.safe_dump(named(tree, "ci", training__learning_rate=1e15)))
    crashed = retrain(live, str(config))
    assert crashed.returncode == 1
    assert "training diverged" in crashed.stdout
    told = live.until(lambda: [text for text in live.told if "training diverged" in text], 60)
    assert json.loads(told[0])["text"].startswith("SAE Foundry: retrain ")
    away = retrain(live, "quickstart", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert away.returncode == 3


def test_a_schedule_fires_by_itself_and_retrains_what_changed_and_ci_passes_and_fails_by_the_gate(
    live: Live, tree: dict, mlflow: MlflowClient, tmp_path: Path, nightly: Path
):
    """Both together, as either waits most of its time."""
    check_ci(live, tree, tmp_path)

    def ended() -> list[dict[str, Any]]:
        return [run for run in live.flow_runs("nightly/nightly") if run["state_type"] == "COMPLETED"]

    live.until(lambda: len(ended()) >= 2, 240, lambda: str([run["state"] for run in live.flow_runs("nightly/nightly")]))
    first, second = ended()[:2]
    assert first["auto_scheduled"]
    assert second["auto_scheduled"]
    assert first["state"]["name"] == "Retrained"
    assert second["state"]["name"] == "NothingToDo"
    assert "nothing to do: version 1 of scheduled" in second["state"]["message"]
    nightly.write_text(yaml.safe_dump(named(tree, "scheduled", sae__sparsity_coefficient=2.0)))
    changed = live.until(lambda: [run for run in ended() if "sparsity_coefficient" in (run["state"]["message"] or "")], 240)[0]
    assert "sae.sparsity_coefficient 5.0 -> 2.0" in changed["state"]["message"]
    assert len(mlflow.search_model_versions("name = 'scheduled'")) == 2


def test_a_run_that_dies_in_training_goes_on_from_its_checkpoint_with_the_same_weights(
    live: Live, tree: dict, mlflow: MlflowClient, bucket: s3fs.S3FileSystem, tmp_path: Path
):
    long = {"training__tokens": 1_000_000, "training__checkpoint_tokens": 50_000, "training__log_tokens": 50_000}
    run = live.submit("pipeline/quickstart", {"config": named(tree, "killed", **long)})
    checkpoints = f"{live.stack.storage_root}/saes/killed-*/checkpoints/*"
    live.until(lambda: bucket.glob(checkpoints) and trainings(), 240, lambda: live.logs(run))
    (training,) = trainings()
    flow = training.parent()
    flow.kill()
    live.wait(run, 60, lambda found: found["state_name"] in ("Crashed", "AwaitingRetry") or found["run_count"] > 1)
    ended = live.wait(run, 240, lambda found: found["state_type"] == "COMPLETED")
    assert ended["run_count"] == 2
    assert "train: continuing from step" in live.logs(run)
    undisturbed = resolve(parse_config({**named(tree, "undisturbed", **long), "storage": {"root": str(tmp_path / "root")}}))
    steps.extract(undisturbed)
    weights = steps.train(undisturbed).weights_sha256
    assert mlflow.get_model_version_by_alias("killed", "champion").tags["sae.weights_sha256"] == weights
    (only,) = mlflow.search_runs(
        [mlflow.get_experiment_by_name("sae-foundry").experiment_id], "attributes.run_name LIKE 'killed:%'"
    )
    assert only.info.status == "FINISHED"


def test_killed_flow_processes_disturb_no_sibling_and_no_worker(live: Live, tree: dict, mlflow: MlflowClient):
    """The short form of the soak test's 20 kills."""
    killed_beside_siblings(live, tree, mlflow, victims=2, kills=1)


def test_a_cancelled_run_ends_its_training_and_leaves_a_checkpoint(live: Live, tree: dict, bucket: s3fs.S3FileSystem):
    endless = named(tree, "cancelled", training__tokens=500_000_000, training__checkpoint_tokens=400_000_000)
    run = live.submit("pipeline/quickstart", {"config": endless})
    live.until(lambda: trainings() and "training-progress" in live.artifacts(run), 240, lambda: live.logs(run))
    live.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    live.wait(run, 90, lambda found: found["state_type"] == "CANCELLED")
    live.until(lambda: not trainings(), 30)
    assert bucket.glob(f"{live.stack.storage_root}/saes/cancelled-*/checkpoints/*")


def test_servers_that_are_killed_come_back_and_no_run_notices_nor_two_of_the_same(live: Live, tree: dict, mlflow: MlflowClient):
    names = ("outage", "twin", "twin")
    live.supervisor.stop_service("s3")
    runs = [live.submit("pipeline/quickstart", {"config": named(tree, name)}) for name in names]
    live.until(lambda: "trying again" in live.logs(runs[0]), 120)
    time.sleep(storage.PROBE_SECONDS + 3)  # longer than somebody at a terminal is left without an answer
    live.supervisor.start_service("s3")
    for service in ("s3", "mlflow", "prefect"):
        live.kill(service)
        time.sleep(1)
    for run in runs:
        assert live.wait(run, 300)["state_type"] == "COMPLETED", live.logs(run)
    (version,) = mlflow.search_model_versions("name = 'twin'")
    assert mlflow.get_run(version.run_id).info.status == "FINISHED"
    experiment = mlflow.get_experiment_by_name("sae-foundry").experiment_id
    assert len(mlflow.search_runs([experiment], "attributes.run_name LIKE 'twin:%'")) == 1
    assert len(mlflow.search_logged_models([experiment], f"source_run_id = '{version.run_id}'")) == 1


def test_a_flow_that_cannot_be_imported_is_not_started_for_ever(live: Live):
    known = live.deployment("pipeline/quickstart")
    broken = {"name": "broken", "flow_id": known["flow_id"], "work_pool_name": "cpu", "entrypoint": "flows.missing.flow"}
    live.ask("/deployments/", broken)
    run = live.submit("pipeline/broken", {})
    ended = live.wait(run, 120)
    assert ended["state_type"] in ("CRASHED", "FAILED")
    live.until(lambda: [text for text in live.told if ended["name"] in text], 60)
    time.sleep(45)  # `crashed-runs-continue` waits for 30 s
    assert live.flow_run(run)["state"]["id"] == ended["state"]["id"]


def test_doctor_finds_the_stack_healthy(live: Live):
    done = subprocess.run([SAE, "doctor", "--json"], env=live.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert found["failures"] == 0
    live.until(lambda: all(row["ready"] for row in json.loads(live.command("status", "--json").stdout)), 30)


def test_a_browser_without_the_password_gets_nothing(live: Live):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{live.stack.prefect_url}/admin/settings", timeout=5)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{live.stack.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=5", timeout=5)


def test_no_secret_is_in_a_log_a_run_an_artifact_or_the_process_list(live: Live, bucket: s3fs.S3FileSystem):
    import psutil

    planted = {**vars(live.stack.secrets), "notifications": NOTIFY_SECRET}
    places: dict[str, str] = {}
    for path in [*(live.folder / "log").iterdir(), *(live.folder / "s3").glob("*.log")]:
        places[str(path)] = path.read_text(errors="replace")
    for process in psutil.process_iter(["cmdline"]):
        places[f"process {process.pid}"] = " ".join(process.info["cmdline"] or [])
    offset = 0
    while lines := live.ask("/logs/filter", {"limit": 200, "offset": offset}):
        places[f"flow logs from {offset}"] = "\n".join(line["message"] for line in lines)
        offset += 200
    for kind in ("flow_runs", "artifacts", "deployments", "automations"):
        places[kind] = json.dumps(live.ask(f"/{kind}/filter", {"limit": 200}))
    for database in ("mlflow", "prefect"):
        dump = [str(postgres.tool("pg_dump")), "-h", "127.0.0.1", "-p", str(live.stack.ports.postgres), "-U", "sae", database]
        done = subprocess.run(
            dump, capture_output=True, text=True, errors="replace", env={"PGPASSWORD": live.stack.secrets.postgres}
        )
        assert done.returncode == 0, done.stderr
        places[f"database {database}"] = done.stdout
    for path in [*bucket.find("s3://mlflow"), *bucket.find(live.stack.storage_root)]:
        if bucket.size(path) < 5_000_000:
            places[path] = bucket.cat_file(path).decode("utf-8", "replace")
    assert len(places) > 50
    found = [(name, place) for place, text in places.items() for name, secret in planted.items() if secret in text]
    assert found == []
