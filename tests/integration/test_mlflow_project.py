"""`mlflow run mlflow` as a user calls it, from a folder of theirs: the whole line, in a run of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import ViewType

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def mlflow_run(folder: Path, entry_point: str, **parameters: str) -> subprocess.CompletedProcess:
    bin_folder = Path(sys.executable).parent
    given = [part for name, value in parameters.items() for part in ("-P", f"{name}={value}")]
    command = [str(bin_folder / "mlflow"), "run", str(ROOT / "mlflow"), "-e", entry_point, *given, "--env-manager", "local"]
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",  # as in an activated environment: the project calls `sae`
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_entry_point_runs_the_line_beside_the_run_that_mlflow_opens_for_it(tiny_tree: dict, tmp_path: Path):
    del tiny_tree["storage"]
    config, root, folder = tmp_path / "tiny.yaml", tmp_path / "a root", tmp_path / "anywhere"
    config.write_text(yaml.safe_dump(tiny_tree))
    folder.mkdir()
    before = sorted((ROOT / "mlflow").iterdir())
    done = mlflow_run(folder, "main", config=str(config), root=str(root))
    assert done.returncode == 0, done.stderr
    assert len(list((root / "saes").glob("*/evaluation.json"))) == 1
    assert sorted((ROOT / "mlflow").iterdir()) == before

    uri = f"sqlite:///{folder / 'mlflow.db'}"  # where `mlflow run` tracks; ours follows it
    client = MlflowClient(uri, uri)  # the registry too: another test may have named one for the whole process
    (project,) = client.search_runs(["0"], run_view_type=ViewType.ALL)
    assert project.info.status == "FINISHED"
    assert project.data.params == {"config": str(config), "root": shlex.quote(str(root))}
    assert project.data.metrics == {}
    assert not [name for name in project.data.tags if name.startswith("sae.")]
    ours = client.get_experiment_by_name("sae-foundry").experiment_id
    (run,) = client.search_runs([ours])
    assert (run.info.status, run.data.params["training.tokens"]) == ("FINISHED", "20000")
    assert "mlflow.parentRunId" not in run.data.tags
    assert [found.run_id for found in client.search_model_versions()] == [run.info.run_id]

    failed = mlflow_run(folder, "plan", config="no-such-configuration", root=str(root))
    assert failed.returncode == 1
    assert "no-such-configuration" in failed.stderr
    statuses = [found.info.status for found in client.search_runs(["0"], order_by=["attributes.start_time DESC"])]
    assert statuses == ["FAILED", "FINISHED"]
