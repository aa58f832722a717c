"""A stack as its users have it: started by the command, asked over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from infra.stack.settings import REPOSITORY, Stack, load
from infra.stack.supervision import Supervisor

NOTIFY_SECRET = "planted-secret-27182"
"""Part of the notification's address, as it is of Slack's."""
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Live:
    """A running stack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[str] = []
        """What the stack has posted to the address that notifications go to."""
        self._receiver = ThreadingHTTPServer(("127.0.0.1", 0), _listening(self.told))
        threading.Thread(target=self._receiver.serve_forever, daemon=True).start()
        os.environ["SAE_NOTIFY_URL"] = f"http://127.0.0.1:{self._receiver.server_address[1]}/hook-{NOTIFY_SECRET}"
        self.command("start", "--free-ports", timeout=400)
        found = load(folder)
        assert found is not None
        self.stack: Stack = found
        self.supervisor = Supervisor(folder)

    def command(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "infra.stack", arguments[0], "--folder", str(self.folder), *arguments[1:]],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def stop(self) -> None:
        self.command("stop", timeout=400)
        shutil.rmtree(self.stack.postgres_folder, ignore_errors=True)
        self._receiver.shutdown()
        del os.environ["SAE_NOTIFY_URL"]

    @property
    def environment(self) -> dict[str, str]:
        """Of a user of the stack."""
        return {**os.environ, **self.stack.client_environment(), "PREFECT_HOME": str(self.folder / "user")}

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """The Prefect API's answer; it is asked again while the server is away."""
        data = None if body is None else json.dumps(body).encode()
        login = b64encode(self.stack.prefect_login.encode()).decode()
        for attempt in range(120):
            request = urllib.request.Request(
                self.stack.prefect_url + path, data=data, method=method,
                headers={"Content-Type": "application/json", "Authorization": f"Basic {login}"},
            )  # fmt: skip
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    content = answer.read()
                    return json.loads(content) if content else None
            except urllib.error.HTTPError as error:
                if error.code >= 500 and attempt < 10:  # a machine that is too busy
                    time.sleep(1)
                    continue
                raise AssertionError(f"{path}: {error.code} {error.read()[:500]!r}") from error
            except OSError:
                if attempt == 119:
                    raise
                time.sleep(1)
        raise AssertionError

    def deployment(self, name: str) -> dict[str, Any]:
        return dict(self.ask(f"/deployments/name/{name}"))

    def submit(self, deployment: str, parameters: dict[str, Any]) -> str:
        known = self.deployment(deployment)["id"]
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"/deployments/{known}/create_flow_run", body)["id"])

    def flow_run(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"/flow_runs/{run}"))

    def flow_runs(self, deployment: str) -> list[dict[str, Any]]:
        """Of one deployment, the oldest first."""
        known = {"deployments": {"id": {"any_": [self.deployment(deployment)["id"]]}}}
        return list(self.ask("/flow_runs/filter", {**known, "sort": "EXPECTED_START_TIME_ASC"}))

    def wait(self, run: str, seconds: float = 240, final: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """The flow run once it has ended, or `final` says that it may be looked at."""
        reached = final or (lambda found: found["state_type"] in FINAL)
        found = self.flow_run(run)
        self.until(lambda: reached(found := self.flow_run(run)), seconds, lambda: f"{found['state']}\n{self.logs(run)}")
        return self.flow_run(run)

    def until(self, reached: Callable[[], Any], seconds: float, say: Callable[[], str] = lambda: "") -> Any:
        deadline = time.monotonic() + seconds
        while not (found := reached()):
            assert time.monotonic() < deadline, f"not reached in {seconds:g} s: {say()}"
            time.sleep(0.25)
        return found

    def logs(self, run: str) -> str:
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(line["message"] for line in self.ask("/logs/filter", body))

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """The flow run's artifacts by key, the newest of each."""
        found = self.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        return {artifact["key"]: artifact for artifact in sorted(found, key=lambda artifact: artifact["created"])}

    def emit(self, event: dict[str, Any]) -> None:
        self.ask("/events", [event])

    def processes(self, service: str) -> list[psutil.Process]:
        """The process of a service and all that descend from it."""
        process = psutil.Process(self.supervisor.states()[service]["pid"])
        return [process, *process.children(recursive=True)]

    def kill(self, service: str) -> None:
        """kill -9 to the server itself, as the kernel does it when memory runs out; the supervisor starts it again."""
        first, *others = self.processes(service)
        (others[0] if first.name() == "sh" else first).kill()


def _listening(told: list[str]) -> type[BaseHTTPRequestHandler]:
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    return Receiver


def named(tree: dict, name: str, **changes: Any) -> dict:
    """The configuration with another name, and with values such as `training__tokens`."""
    tree = deepcopy(tree)
    tree["name"], tree["tracking"]["registered_model"] = name, name
    for field, value in changes.items():
        part, _, leaf = field.partition("__")
        tree[part][leaf] = value
    return tree


def trainings() -> list[psutil.Process]:
    """Training processes on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "components.training.process" in (process.info["cmdline"] or []):
            found.append(process)
    return found
