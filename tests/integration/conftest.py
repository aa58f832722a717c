"""Real servers on loopback: SeaweedFS as S3, PostgreSQL, MLflow; each started once, and only for the tests that use it."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from components import storage

BIN = Path(sys.executable).parent
KEYS = {"AWS_ACCESS_KEY_ID": "foundry-test", "AWS_SECRET_ACCESS_KEY": "planted-secret-31415", "AWS_DEFAULT_REGION": "us-east-1"}


def free_ports(count: int) -> list[int]:
    """Ports that are free, with the one 10,000 above too (SeaweedFS puts gRPC there)."""
    found: list[int] = []
    for port in range(18_000, 20_000):
        try:
            for candidate in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free ports")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket's URL; the environment of this process points at its server."""
    folder = tmp_path_factory.mktemp("seaweed")
    credentials = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
    identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "id.json").write_text(json.dumps({"identities": [identity]}))
    port, master, volume, filer = free_ports(4)
    command = [
        str(BIN / "weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}",
        f"-s3.config={folder}/id.json", "-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-bucket=acts,mlflow",
        f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-filer.localSocket={folder}/f.sock",
        "-s3.cacheCapacityMB=64",
    ]  # fmt: skip
    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(120):
                try:
                    storage.put_bytes(b"", "s3://acts/ready")
                    break
                except Exception:  # not up yet, in one of many ways
                    assert server.poll() is None, (folder / "log").read_text()
                    time.sleep(0.5)
            else:
                raise TimeoutError("the S3 server did not come up")
            yield "s3://acts"
        finally:
            server.terminate()
            server.wait(timeout=30)


class MLflowServer:
    """`mlflow server` as `mlflow/server.env` sets it up, that can be killed and started again on the same port."""

    def __init__(self, folder: Path, database: str, artifacts: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.environment = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
            "MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "2"]
        log_path = self.folder / "mlflow.log"
        with log_path.open("a") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        for _ in range(480):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self.process.poll() is None, log_path.read_text()
                time.sleep(0.25)
        raise TimeoutError(log_path.read_text())

    def kill(self) -> None:
        """kill -9, with its workers."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def _postgres_tool(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URI of an empty database; skips where PostgreSQL is not installed. (SQLAlchemy 2.1 takes a plain `postgresql:`
    for psycopg 3.)"""
    initdb, pg_ctl = _postgres_tool("initdb"), _postgres_tool("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL is not installed: initdb and pg_ctl are needed (apt-get install postgresql)")
    # Not under pytest's folder: every pytest that starts makes that one private to its user again.
    folder = Path(tempfile.mkdtemp(prefix="sae-postgres-"))
    user: dict[str, int] = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres' to run it as")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = {"user": owner.pw_uid, "group": owner.pw_gid}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = str(folder / "data")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off -c max_connections=200"
    commands = [
        [initdb, "-D", data, "-U", "mlflow", "--auth=trust", "-E", "UTF8", "--locale=C", "-N"],
        [pg_ctl, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "-t", "60", "start"],
    ]
    for command in commands:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **user)
        assert done.returncode == 0, (folder / "log").read_text() if (folder / "log").exists() else command
    try:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([pg_ctl, "-D", data, "-m", "immediate", "stop"], cwd=folder, stdout=subprocess.DEVNULL, **user)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def mlflow_server(postgres: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """MLflow on PostgreSQL, with artifacts on S3 through the server's proxy."""
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"), postgres, "s3://mlflow/artifacts")
    server.start()
    yield server
    server.kill()
