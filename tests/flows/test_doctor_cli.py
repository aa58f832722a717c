"""`sae doctor` as a user meets it, and what it says of Prefect servers that are not as they should be."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from components.doctor import checks as doctor
from components.doctor.check import Check
from components.doctor.prefect_server import prefect_checks
from components.run.config import parse_config
from flows.cli.doctor import _print_checks

SAE = str(Path(sys.executable).parent / "sae")
PASSWORD = "me:planted-secret-22222"


@contextmanager
def prefect_server(answers: dict[str, tuple[int, Any]]) -> Iterator[list[str]]:
    """JSON by path under `/api`, at the address in Prefect's settings. Gives the credentials that were sent."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append(self.headers.get("Authorization", ""))
            status, value = answers.get(self.path.removeprefix("/api"), (404, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/api"
    try:
        with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: PASSWORD}):
            yield seen
    finally:
        server.shutdown()
        server.server_close()


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


HEALTHY = {"/health": (200, True), "/admin/version": (200, prefect.__version__), "/admin/settings": (200, {})}


def test_without_an_address_a_run_starts_its_own_server():
    [check] = prefect_checks()
    assert (check.status, check.advice) == ("ok", None)
    assert "temporary server" in check.found
    assert by_name(prefect_checks("gpu"))["training limit"].status == "failure"


def test_a_prefect_server_with_all_that_deployments_need():
    worker = {"status": "ONLINE", "last_heartbeat_time": "2026-01-01T00:00:00Z"}
    answers = HEALTHY | {
        "/admin/settings": (200, {"server": {"database": {"driver": "postgresql+asyncpg", "connection_url": "****"}}}),
        "/work_pools/cpu": (200, {"status": "READY"}),
        "/work_pools/gpu": (200, {"status": "READY"}),
        "/work_pools/cpu/workers/filter": (200, [worker, {"status": "OFFLINE"}]),
        "/work_pools/gpu/workers/filter": (200, [worker]),
        "/v2/concurrency_limits/training": (200, {"limit": 1, "active_slots": 0, "active": True}),
    }
    with prefect_server(answers) as seen:
        checks = by_name(prefect_checks("training"))
    assert {name: check.status for name, check in checks.items() if check.status != "ok"} == {}
    assert checks["pool cpu"].found == "1 of 2 workers online"
    assert seen[-1].startswith("Basic ")


def test_what_deployments_miss_is_said_with_the_command_that_makes_it():
    idle = {"status": "OFFLINE", "last_heartbeat_time": "2026-01-01T10:00:00.123Z"}
    answers = HEALTHY | {
        "/admin/version": (200, "3.1.0"),
        "/admin/settings": (200, {"server": {"database": {"driver": "sqlite+aiosqlite"}}}),
        "/work_pools/cpu": (200, {"status": "NOT_READY"}),
        "/work_pools/cpu/workers/filter": (200, [idle]),
    }
    with prefect_server(answers):
        checks = by_name(prefect_checks("training"))
    assert {name: check.status for name, check in checks.items() if check.status not in ("ok", "skipped")} == {
        "version": "warning",
        "database": "warning",
        "pool cpu": "warning",
        "pool gpu": "warning",
        "training limit": "failure",
    }
    assert "prefect worker start --pool cpu" in checks["pool cpu"].advice
    assert "2026-01-01T10:00:00" in checks["pool cpu"].found
    assert "prefect work-pool create --type process gpu" in checks["pool gpu"].advice
    assert "prefect gcl create training --limit 1" in checks["training limit"].advice
    assert "PostgreSQL" in checks["database"].advice


@pytest.mark.parametrize(
    ("answers", "name", "advice"),
    [
        ({}, "server", "ends in `/api`"),
        ({"/health": (200, True), "/admin/version": (401, {})}, "API", "PREFECT_API_AUTH_STRING"),
        ({"/health": (200, True), "/admin/version": (200, "2.20.1")}, "version", f"prefect=={prefect.__version__}"),
    ],
)
def test_a_prefect_server_that_cannot_be_used(answers: dict, name: str, advice: str):
    with prefect_server(answers):
        checks = by_name(prefect_checks())
    assert checks[name].status == "failure"
    assert advice in checks[name].advice
    assert "planted" not in str(checks)


def test_a_prefect_server_that_is_away():
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        [check] = prefect_checks()
    assert check.status == "failure"
    assert "prefect server start" in check.advice


def test_everything_away_is_said_in_time_without_a_secret_and_ends_with_1(
    tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_tree | {"storage": {"root": "s3://acts/runs"}}))
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_SECRET_ACCESS_KEY": "planted-secret-1", "AWS_ACCESS_KEY_ID": "me",
        "MLFLOW_TRACKING_URI": "http://me:planted-secret-2@127.0.0.1:9", "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_API_AUTH_STRING": "me:planted-secret-3", "COLUMNS": "80",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    done = subprocess.run([SAE, "doctor", str(config), "--json"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    failures = [check for check in result["checks"] if check["status"] == "failure"]
    assert [(check["section"], check["name"]) for check in failures] == [
        ("storage", "endpoint"), ("MLflow", "server"), ("Prefect", "server"),
    ]  # fmt: skip
    assert result["failures"] == 3
    assert all(check["advice"] for check in failures)
    assert "planted" not in done.stdout + done.stderr
    _print_checks(result)
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80
    assert "3 failed" in shown[-1]


def test_what_a_run_needs_is_compared_and_a_plan_that_fails_or_takes_long_hides_nothing(
    tiny_tree: dict, monkeypatch: pytest.MonkeyPatch
):
    config = parse_config(tiny_tree)
    checks = by_name(doctor.room_checks(config, sized=True))
    assert "needed" in checks["disk"].found
    assert "needed" in checks["memory"].found
    assert "plan" not in checks
    wrong = parse_config(tiny_tree | {"activations": {"hook_points": ["resid_post.9"]}})
    checks = by_name(doctor.room_checks(wrong, sized=True))
    assert "resid_post.9" in checks["plan"].found
    assert "needed" not in checks["disk"].found
    monkeypatch.setattr(doctor, "_PLAN_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "estimated", lambda config: time.sleep(1))
    checks = by_name(doctor.room_checks(config, sized=True))
    assert (checks["plan"].status, checks["disk"].status) == ("skipped", "ok")


def test_a_mistake_is_one_sentence_and_exit_code_2():
    done = subprocess.run([SAE, "doctor", "--set", "storage.rot=x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "storage.rot" in done.stderr
    assert done.stdout == ""
