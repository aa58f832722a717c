"""A Prefect server on PostgreSQL lists runs whose parameters hold the greatest numbers that a configuration takes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psycopg2
import pytest

from components.bounds import LARGEST_FLOAT, LARGEST_INT
from components.run.config import parse_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with an empty database."""
    address = postgres.replace("+psycopg2", "")
    connection = psycopg2.connect(address)
    connection.autocommit = True
    connection.cursor().execute("create database prefect_numbers")
    connection.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    database = postgres.replace("+psycopg2", "+asyncpg").rpartition("/")[0] + "/prefect_numbers"
    home: Path = tmp_path_factory.mktemp("prefect")
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60, headers={"Connection": "close"})
    try:
        deadline = time.monotonic() + 300  # it makes its tables first
        while time.monotonic() < deadline:
            assert process.poll() is None, (home / "log").read_text()
            with suppress(httpx.HTTPError):
                if client.get("/health").status_code == 200:
                    break
            time.sleep(0.5)
        else:
            raise TimeoutError("the Prefect server does not answer")
        yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_the_greatest_accepted_numbers_are_listed_and_greater_ones_are_not(server: httpx.Client):
    flow = server.post("/flows/", json={"name": "numbers"}).json()["id"]

    def run(parameters: dict) -> str:
        made = server.post("/flow_runs/", json={"flow_id": flow, "parameters": parameters})
        assert made.status_code in (200, 201), made.text
        return str(made.json()["id"])

    def listing() -> int:
        return server.post("/flow_runs/filter", json={}).status_code

    training = {"tokens": LARGEST_INT, "learning_rate": LARGEST_FLOAT, "clip_gradient_norm": 5e-324}
    tree = parse_config({"seed": LARGEST_INT, "training": training}).model_dump(mode="json")
    fine = run({"config": tree, "lowest": [-LARGEST_INT, -LARGEST_FLOAT, 0.1 + 0.2]})
    assert listing() == 200
    kept = server.get(f"/flow_runs/{fine}").json()["parameters"]
    assert parse_config(kept["config"]).model_dump(mode="json") == tree
    # Why there are bounds; where a newer server lists this too, they may be wider.
    poison = run({"learning_rate": 1e30})
    assert listing() == 500
    server.delete(f"/flow_runs/{poison}")
    assert listing() == 200
