"""An MLflow server with users and passwords as `mlflow/basic_auth.ini` sets it up, on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.server.auth.client import AuthServiceClient
from mlflow_process import Served, mlflow_process

from components import steps
from components.registry.catalogue import list_models
from components.registry.records import Outcome
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.tracking.store import connect

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PASSWORDS = {"admin": "Of-the-Administrator-1", "ada": "Of-Ada-the-Second-2", "bob": "Of-Bob-the-Third-3"}
SECRET_KEY = "of-the-sign-up-page"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Runs and users in one database, as in the file that ships; of it only the address is another."""
    folder = tmp_path_factory.mktemp("mlflow-auth")
    sqlite = request.param == "sqlite"
    database = f"sqlite:///{folder / 'mlflow.db'}" if sqlite else _new_database(request.getfixturevalue("postgres"))
    shipped = (ROOT / "mlflow" / "basic_auth.ini").read_text()
    ini, changed = re.subn(r"(?m)^database_uri = .*$", f"database_uri = {database}", shipped)
    assert changed == 1
    (folder / "basic_auth.ini").write_text(ini)
    environment = {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET_KEY,
    }
    with mlflow_process(folder, environment, "--app-name", "basic-auth", "--workers", "2") as served:
        yield served


def _new_database(server: str) -> str:
    import psycopg2

    connection = psycopg2.connect(server.replace("+psycopg2", ""))
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE mlflow_with_users")
    connection.close()
    return f"{server.rpartition('/')[0]}/mlflow_with_users"


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch):
    def become(user: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS[user])

    return become


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def sae(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "sae"), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("user", [None, "admin"])
def test_who_has_no_password_gets_nothing_and_one_sentence(server: Served, user: str | None):
    assert status(f"{server.uri}/health") == 200
    for path in ("", "api/2.0/mlflow/experiments/search?max_results=1", "api/2.0/mlflow-artifacts/artifacts?path=", "graphql"):
        assert status(f"{server.uri}/{path}") == 401
    wrong = {} if user is None else {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": "a-wrong-password"}
    done = sae("models", "list", "--uri", server.uri, **wrong)
    assert done.returncode == 2, done.stderr
    assert "MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def line(tree: dict, **tracking) -> tuple[Specification, Outcome]:
    plan = resolve(parse_config({**tree, "tracking": {**tree["tracking"], **tracking}}))
    steps.extract(plan)
    with steps.tracked(plan, {}) as run:
        steps.train(plan, run.add_points)
        steps.evaluate(plan)
        return plan, steps.register(plan, run)


def test_a_user_runs_the_whole_line_which_others_read_and_do_not_change(server: Served, tiny_tree: dict, login):
    tiny_tree["tracking"] |= {"uri": server.uri, "registered_model": "of-ada"}
    login("admin")
    for user in ("ada", "bob"):
        AuthServiceClient(server.uri).create_user(user, PASSWORDS[user])

    login("ada")
    plan, outcome = line(tiny_tree)
    assert outcome.alias == "champion"
    client = connect(plan.config.tracking, "unused")
    assert client.get_run(outcome.mlflow_run).info.status == "FINISHED"

    login("bob")
    (model,) = list_models(client, "of-ada")
    assert model["champion"] == "1"
    answer = mlflow.pyfunc.load_model("models:/of-ada@champion").predict(np.ones((1, 32), np.float32))
    assert answer["features"].shape == (1, 64)
    with pytest.raises(UserError, match=r"does not allow this to 'bob'"):
        line(tiny_tree, registered_model="of-bob")  # in the experiment that is Ada's
    forced = ["models", "promote", "of-ada/1", "--force", "--reason", "mine", "--uri", server.uri]
    refused = sae(*forced)
    assert refused.returncode == 2
    assert "does not allow this to 'bob'" in refused.stderr
    _, outcome = line(tiny_tree, registered_model="of-bob", experiment="of-bob")
    assert outcome.alias == "champion"

    login("ada")
    for experiment in ("sae-foundry", "sae-foundry-promotions"):
        number = client.get_experiment_by_name(experiment).experiment_id
        AuthServiceClient(server.uri).grant_user_permission("bob", "experiment", number, "EDIT")
    AuthServiceClient(server.uri).grant_user_permission("bob", "registered_model", "of-ada", "EDIT")
    login("bob")
    assert sae(*forced).returncode == 0

    log = server.log.read_text()
    assert not [secret for secret in (*PASSWORDS.values(), SECRET_KEY) if secret in log]
