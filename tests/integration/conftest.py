"""Real servers on loopback, each started once, and only for the tests that use it."""

from __future__ import annotations

import os
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
from typing import Any

import pytest
import s3fs
from chromium import Page, browsing
from mlflow import MlflowClient
from seaweed import Seaweed
from stack_client import Live
from xdist.scheduler import LoadScopeScheduling

from components import storage
from components.storage.retries import patience
from infra.stack import postgres as cluster

SHARED = {
    **dict.fromkeys(["test_stack", "test_stack_closed", "test_tutorials"], "stack"),
    **dict.fromkeys(["test_mlflow_servers", "test_doctor"], "mlflow"),
    **dict.fromkeys(["test_saelens", "test_saelens_evaluation", "test_saebench_layout", "test_peer_formats"], "peers"),
}
"""Files whose tests share what takes long to start or to install."""


class Together(LoadScopeScheduling):
    """Tests of a file, and of files that share a server, run one after the other in one process. (xdist's own `loadgroup` does
    nothing with pytest 9: its hook is not called.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0]).stem
        return SHARED.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of the stack first: they take longest, most of it waiting."""
    items.sort(key=lambda item: SHARED.get(item.path.stem) != "stack")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """SeaweedFS; the environment of this process points at it."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.start()
        try:
            server.wait_until_ready()
            with patience(60):  # it listens a little before it works
                storage.put_bytes(b"", "s3://acts/ready")
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def s3(s3_server: Seaweed) -> str:
    """A bucket's URL."""
    return "s3://acts"


# SAELens 6.54, sparsify, dictionary_learning, circuit-tracer and SAEBench with what their classes import beyond our own
# environment.
PACKAGES = [
    "sae-lens==6.54.12", "transformer-lens==2.16.1", "einops==0.8.2", "jaxtyping==0.3.11", "wadler-lindig==0.1.8",
    "fancy-einsum==0.0.3", "beartype==0.14.1", "better-abc==0.0.3", "simple-parsing==0.1.8", "docstring-parser==0.18.0",
    "babe==0.0.7", "py2store==0.1.24", "dol==0.3.100", "config2py==0.1.76", "nltk==3.9.2", "plotly==6.5.0",
    "plotly-express==0.4.1", "narwhals==2.29.0", "typeguard==4.6.0", "wandb==0.31.0",
    "eai-sparsify==1.3.3", "natsort==8.4.0", "schedulefree==1.4.1", "dictionary-learning==0.1.0", "circuit-tracer==0.5.0",
    "sae-bench==0.6.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """Of a browser without a window. Skips where there is none, and fails in CI."""
    try:
        with browsing() as opened:
            yield opened
    except OSError as error:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"there is no Chromium on PATH, and none could be fetched from the npm registry: {error}")


@pytest.fixture(scope="session")
def saelens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with SAELens and other peers, which ask for another torch than ours: they go there without their requirements,
    and processes that should see them get that folder on their path. Skips with pip's words where they cannot be installed,
    and fails in CI."""
    folder = tmp_path_factory.mktemp("saelens")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"SAELens cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    with pytest.MonkeyPatch.context() as patch:
        # Triton is there for the interpreter of our own kernels; sparsify would run its on a CPU, which has no driver for them.
        patch.setenv("SPARSIFY_DISABLE_TRITON", "1")
        yield folder


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


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URI of an empty database; skips where PostgreSQL is not installed. (The driver is named, since SQLAlchemy
    2.1 takes a plain `postgresql:` for psycopg 3.)"""
    initdb, pg_ctl = cluster.tool("initdb"), cluster.tool("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip(cluster.MISSING)
    # Not under pytest's folder: every pytest that starts makes that one private to its user again.
    folder = Path(tempfile.mkdtemp(prefix="sae-postgres-"))
    try:
        user = cluster.owner()
    except RuntimeError as error:
        pytest.skip(str(error))
    if user is not None:
        shutil.chown(folder, user, user)
    run_as = cluster.run_as(user)
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
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **run_as)
        assert done.returncode == 0, (folder / "log").read_text() if (folder / "log").exists() else command
    try:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([pg_ctl, "-D", data, "-m", "immediate", "stop"], cwd=folder, stdout=subprocess.DEVNULL, **run_as)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def mlflow_server(postgres: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """MLflow on PostgreSQL, with artifacts on S3 through the server's proxy."""
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"), postgres, "s3://mlflow/artifacts")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """The whole stack, as `make stack` starts it, under a umask that opens everything."""
    if cluster.tool("initdb") is None:
        pytest.skip(cluster.MISSING)
    folder = Path(tempfile.mkdtemp(prefix="sae-stack-"))  # a short path: sockets have no room for a long one
    folder.chmod(0o755)
    before = os.umask(0)
    try:
        stack = Live(folder)
    finally:
        os.umask(before)
    try:
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gates") / "gates.yaml"
    path.write_text("evaluation_tokens: 100\n")
    return path


@pytest.fixture
def tree(tiny_tree: dict, gates: Path) -> dict:
    """A configuration that says nothing of the machine."""
    del tiny_tree["storage"], tiny_tree["device"]
    tiny_tree["tracking"] = {"gates": str(gates)}
    return tiny_tree


@pytest.fixture
def mlflow(live: Live, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    for name, value in live.stack.client_environment().items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    return MlflowClient(live.stack.mlflow_url, live.stack.mlflow_url)


@pytest.fixture
def bucket(live: Live) -> s3fs.S3FileSystem:
    secrets = live.stack.secrets
    return s3fs.S3FileSystem(
        key=secrets.s3_access, secret=secrets.s3_secret, endpoint_url=live.stack.s3_url, use_listings_cache=False
    )
