"""`mlflow server` on a free port of loopback, for one test; the environment is what the test gives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    uri: str
    log: Path


@contextmanager
def mlflow_process(folder: Path, environment: dict[str, str], *arguments: str) -> Iterator[Served]:
    """Ready on entry; artifacts go through the server into `folder` unless the environment says otherwise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = Served(f"http://127.0.0.1:{port}", folder / "mlflow.log")
    settings = {
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **environment,
    }
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), *arguments]
    with served.log.open("a") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **settings}, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_until_ready(served, process)
        yield served
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(served: Served, process: subprocess.Popen) -> None:
    for _ in range(480):
        try:
            with urllib.request.urlopen(f"{served.uri}/health", timeout=2):
                return
        except OSError:
            assert process.poll() is None, served.log.read_text()
            time.sleep(0.25)
    raise TimeoutError(served.log.read_text())
