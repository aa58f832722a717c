"""`sae doctor` against a real S3 server with keys of several rights, and a real MLflow server that goes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from fsspec import AbstractFileSystem

from components import storage
from components.doctor.check import Check, Job, run
from components.doctor.mlflow_server import mlflow_checks
from components.doctor.s3 import s3_checks
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect

pytestmark = pytest.mark.integration

READER = {"AWS_ACCESS_KEY_ID": "foundry-reader", "AWS_SECRET_ACCESS_KEY": "planted-secret-14142"}


@pytest.fixture(scope="module")
def reader_server(s3_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of another server of the same kind, for an identity that may read and nothing else."""
    server = type(s3_server)(tmp_path_factory.mktemp("seaweed-reader"))
    path = server.folder / "id.json"
    identities = json.loads(path.read_text())
    [key, secret] = READER.values()
    credentials = [{"accessKey": key, "secretKey": secret}]
    identities["identities"].append({"name": "reader", "credentials": credentials, "actions": ["Read", "List"]})
    path.write_text(json.dumps(identities))
    server.start()
    try:
        server.wait_until_ready()
        wait_for_bucket(server.environment)
        yield {**server.environment, **READER}
    finally:
        server.stop()


def wait_for_bucket(environment: dict[str, str]) -> None:
    """The server makes its buckets a little after it listens."""
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )
    for _ in range(120):
        with suppress(ClientError):
            client.head_bucket(Bucket="acts")
            return
        time.sleep(0.5)
    raise TimeoutError("there is no bucket 'acts'")


def checked(monkeypatch: pytest.MonkeyPatch, root: str, **environment: str) -> dict[str, Check]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {check.name: check for check in run([Job("storage", lambda: s3_checks(root))])}


def left(root: str) -> list[str]:
    filesystem: AbstractFileSystem = storage.resolve(root)[0]
    filesystem.invalidate_cache()
    return [name for name in filesystem.find(root) if "doctor" in name]


def test_every_right_is_proved_and_the_probe_is_gone(s3: str, monkeypatch: pytest.MonkeyPatch):
    for root in (f"{s3}/doctored", s3):
        checks = checked(monkeypatch, root)
        assert {check.status for check in checks.values()} == {"ok"}
        assert list(checks) == ["endpoint", "keys", "list", "write", "read", "put if absent", "delete", "S3"]
    assert left(s3) == []


def test_a_store_without_conditional_writes_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch):
    from botocore.client import BaseClient

    send = BaseClient._make_api_call

    def ignoring(client: BaseClient, operation: str, parameters: dict) -> dict:
        return send(client, operation, {name: value for name, value in parameters.items() if name != "IfNoneMatch"})

    monkeypatch.setattr(BaseClient, "_make_api_call", ignoring)
    checks = checked(monkeypatch, f"{s3}/doctored")
    assert [check.name for check in checks.values() if check.status == "failure"] == ["put if absent"]
    assert "If-None-Match" in checks["put if absent"].found
    assert checks["put if absent"].advice.startswith("Use another S3 server")
    assert left(s3) == []


def test_a_probe_is_removed_although_the_server_fails_in_between(s3: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("components.doctor.s3._STEPS_SECONDS", -1.0)
    slow = checked(monkeypatch, f"{s3}/doctored")
    assert slow["list"].status == "skipped"

    def broken(probe: object) -> None:
        raise RuntimeError("in between")

    monkeypatch.setattr("components.doctor.s3._STEPS_SECONDS", 8.0)
    monkeypatch.setattr("components.doctor.s3._Probe._read", broken)
    checks = checked(monkeypatch, f"{s3}/doctored")
    assert checks["write"].status == "ok"
    assert checks["check"].status == "failure"
    assert left(s3) == []


def test_wrong_keys_are_told_apart(s3: str, monkeypatch: pytest.MonkeyPatch):
    secret = checked(monkeypatch, s3, AWS_SECRET_ACCESS_KEY="wrong-secret-27182")
    assert secret["keys"].advice.startswith("AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID")
    assert secret["rights"].status == "skipped"
    unknown = checked(monkeypatch, s3, AWS_ACCESS_KEY_ID="nobody")
    assert unknown["keys"].advice.startswith("The server does not know this AWS_ACCESS_KEY_ID")
    assert "secret-" not in str([secret, unknown])


def test_a_missing_bucket_is_said_and_not_made(s3: str, monkeypatch: pytest.MonkeyPatch):
    for _ in range(2):  # SeaweedFS would make it with an administrator's first write
        checks = checked(monkeypatch, "s3://no-such-bucket/runs")
        assert checks["bucket"].status == "failure"
        assert checks["bucket"].advice.startswith("Make the bucket 'no-such-bucket'")


def test_a_key_that_may_only_read(reader_server: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    checks = checked(monkeypatch, "s3://acts/runs", **reader_server)
    assert {name: check.status for name, check in checks.items()} == {
        "endpoint": "ok", "keys": "ok", "list": "ok", "write": "failure", "read, delete": "skipped", "S3": "ok",
    }  # fmt: skip
    assert checks["write"].advice == ("Give this key the right to write under 'acts/runs' (s3:PutObject in a bucket policy).")


def test_as_a_command_with_wrong_keys(s3: str):
    command = [str(Path(sys.executable).parent / "sae"), "doctor", "--set", f"storage.root={s3}/x", "--json"]
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong-secret-27182"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    failed = [check["name"] for check in json.loads(done.stdout)["checks"] if check["status"] == "failure"]
    assert failed == ["keys", "store"]  # and a bucket cannot hold MLflow's database
    assert "secret-" not in done.stdout + done.stderr


def test_mlflow_takes_a_tag_and_an_artifact_keeps_neither_and_is_said_to_be_away(mlflow_server, s3: str):
    settings = TrackingSettings(uri=mlflow_server.uri, experiment="doctored")
    client = connect(settings, "unused")
    checks = {check.name: check for check in run([Job("MLflow", lambda: mlflow_checks(settings, "unused"))])}
    assert {name: check.status for name, check in checks.items()} == dict.fromkeys(
        ["store", "server", "API", "version", "write", "artifacts", "MLflow"], "ok"
    )
    experiment = client.get_experiment_by_name("doctored")
    assert not [tag for tag in experiment.tags if "doctor" in tag]
    assert client.search_runs([experiment.experiment_id]) == []
    assert left("s3://mlflow") == []
    mlflow_server.kill()
    try:
        away = {check.name: check for check in run([Job("MLflow", lambda: mlflow_checks(settings, "unused"))])}
    finally:
        mlflow_server.start()
    assert away["server"].status == "failure"
    assert "does not answer" in away["server"].found
    assert "planted" not in str(away)
    assert away["server"].advice.startswith("Start the MLflow server")
