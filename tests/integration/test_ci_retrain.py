"""The retrain script as CI calls it, against a real Prefect server and a process that runs a flow `retrain`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]

FLOW = """
import os, signal, time
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed

def tables(gate):
    create_table_artifact([{"metric": "old", "this version": 0, "champion": 0, "change": 0}], key="metrics")
    row = {"metric": "explained_variance", "this version": 0.9, "champion": 0.8, "change": "+0.1"}
    create_table_artifact([row], key="metrics")
    row = {"gate": "l0 | dense", "verdict": gate, "measured": 30, "required": 20, "short by": 10}
    create_table_artifact([row], key="gates")

@flow
def inner():
    create_markdown_artifact("of a subflow", key="mlflow-run")

@flow
def retrain(config: dict, force: bool = False, commit: str | None = None):
    kind = config["name"]
    if kind == "promoted":
        create_markdown_artifact("[the run](https://mlflow.example/1)", key="mlflow-run")
        inner()
        tables("passed")
        return Completed(name="Promoted", message=f"better, force={force}, commit={commit}")
    if kind == "refused":
        tables("failed")
        return Completed(name="Refused", message="l0 is 10 too high")
    if kind == "nothing":
        return Completed(name="NothingToDo", message="the digest is the champion's")
    if kind == "raises":
        raise RuntimeError("out | of <b>memory</b>")
    if kind == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(20 if kind == "slow" else 600)
    return Completed(name="Promoted", message="late, but better")

if __name__ == "__main__":
    retrain.serve(name="ci", limit=5)
"""


@dataclass
class Done:
    code: int
    output: str
    summary: str
    outputs: str


class Stack:
    """A Prefect server and what serves the flow, each in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.api = folder, f"http://127.0.0.1:{self.port}/api"
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SAE_", "GITHUB_"))}
        self.environment = {
            **plain,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
            "PREFECT_CLIENT_MAX_RETRIES": "12",  # the flow runs outlast the server's restart
        }
        (folder / "flow.py").write_text(FLOW)
        self.processes: dict[str, subprocess.Popen] = {}

    def launch(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *command], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def start_server(self) -> None:
        self.launch("server", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--no-ui")

    def wait_for_server(self) -> None:
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"{self.api}/health", timeout=2):
                return
            assert self.processes["server"].poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.5)
        raise TimeoutError((self.folder / "server.log").read_text())

    def configuration(self, name: str) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(f"name: {name}\n")
        return str(path)

    def script(self, *names: str, job: str, **environment: str) -> subprocess.Popen:
        known = {
            "SAE_CONFIGS": "\n".join(self.configuration(name) for name in names),
            "SAE_POLL_SECONDS": "0.5",
            "SAE_CRASH_GRACE_SECONDS": "2",
            "GITHUB_RUN_ID": job,
            "GITHUB_RUN_ATTEMPT": "1",
            "GITHUB_STEP_SUMMARY": str(self.folder / f"{job}.md"),
            "GITHUB_OUTPUT": str(self.folder / f"{job}.out"),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "infra.ci.retrain"],
            cwd=ROOT,
            env={**self.environment, **known, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finished(self, process: subprocess.Popen, job: str) -> Done:
        output, _ = process.communicate(timeout=150)
        summary, outputs = self.folder / f"{job}.md", self.folder / f"{job}.out"
        return Done(process.returncode, output, summary.read_text(), outputs.read_text())


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("ci"))
    try:
        stack.start_server()
        stack.wait_for_server()
        stack.launch("flows", str(stack.folder / "flow.py"))
        yield stack
    finally:
        for name in reversed(stack.processes):
            stack.kill(name)


@pytest.fixture(scope="module")
def api(stack: Stack) -> Iterator:
    """A client of the server, once the deployment is there."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.exceptions import ObjectNotFound

    with SyncPrefectClient(stack.api) as client:
        for _ in range(60):
            with suppress(ObjectNotFound):
                client.read_deployment_by_name("retrain/ci")
                break
            assert stack.processes["flows"].poll() is None, (stack.folder / "flows.log").read_text()
            time.sleep(0.5)
        yield client


def read_until(process: subprocess.Popen, text: str) -> str:
    """The output up to the line with this text."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"it ended without '{text}':\n{seen}")


def test_every_end_has_its_exit_code_and_report(stack: Stack, api):
    jobs = {
        "good": stack.script("promoted", "nothing", job="good", SAE_FORCE="true", GITHUB_SHA="ab" * 20),
        "refused": stack.script("refused", job="refused"),
        "broken": stack.script("raises", "crashes", job="broken"),
    }
    done = {job: stack.finished(process, job) for job, process in jobs.items()}

    good = done["good"]
    assert good.code == 0, good.output
    assert good.outputs == "verdict=Promoted\n"
    assert f"better, force=True, commit={'ab' * 20}" in good.summary
    assert good.summary.startswith("## Retrains: Promoted\n")
    assert "| explained_variance | 0.9 | 0.8 | +0.1 |" in good.summary, "the newest table of a key"
    assert "| old |" not in good.summary
    assert "[the run](https://mlflow.example/1)" in good.summary, "and not the subflow's artifact of that key"
    assert "promoted.yaml: Running" in good.output
    assert "/runs/flow-run/" in good.summary

    refused = done["refused"]
    assert refused.code == 1, refused.output
    assert refused.outputs == "verdict=Refused\n"
    assert "l0 is 10 too high" in refused.summary
    assert "| l0 \\| dense | failed | 30 | 20 | 10 |" in refused.summary

    broken = done["broken"]
    assert broken.code == 1, broken.output
    assert broken.outputs == "verdict=Failed\n"
    assert "raises.yaml: Failed" in broken.summary
    assert "out \\| of &lt;b&gt;memory&lt;/b&gt;" in broken.summary
    assert "crashes.yaml: Crashed" in broken.summary

    runs = [run for run in api.read_flow_runs() if run.parent_task_run_id is None]
    again = stack.finished(stack.script("promoted", "nothing", job="good", SAE_FORCE="true", GITHUB_SHA="ab" * 20), "good")
    assert again.code == 0
    assert len([run for run in api.read_flow_runs() if run.parent_task_run_id is None]) == len(runs) == 5, "nothing doubled"
    tagged = next(run for run in runs if run.parameters["config"] == {"name": "promoted"})
    assert {"ci", "commit:abababababab"} <= set(tagged.tags)


def test_a_cancelled_job_cancels_its_flow_run(stack: Stack, api):
    process = stack.script("hangs", job="hangs")
    read_until(process, "hangs.yaml: Running")
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    done = stack.finished(process, "hangs")
    assert time.monotonic() - started < 9, "GitHub gives ten seconds"
    assert done.code == 143
    assert done.outputs == "verdict=Cancelled\n"
    run = next(run for run in api.read_flow_runs() if run.parameters.get("config") == {"name": "hangs"})
    for _ in range(80):
        if api.read_flow_run(run.id).state.is_cancelled():
            break
        time.sleep(0.5)
    assert api.read_flow_run(run.id).state.is_cancelled(), api.read_flow_run(run.id).state


def test_the_server_may_be_killed_and_come_back(stack: Stack, api):
    process = stack.script("slow", job="slow")
    read_until(process, "slow.yaml: Running")
    stack.kill("server")
    read_until(process, "the Prefect server is away")
    stack.start_server()
    done = stack.finished(process, "slow")
    assert done.code == 0, done.output
    assert "late, but better" in done.summary


def test_a_deployment_that_is_not_there(stack: Stack, api):
    done = stack.finished(stack.script("promoted", job="none", SAE_DEPLOYMENT="retrain/other"), "none")
    assert done.code == 3
    assert "there is no deployment 'retrain/other'" in done.output
    assert done.outputs == "verdict=Unreachable\n"
