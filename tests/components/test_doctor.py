"""The checks of `sae doctor` against small servers that answer wrongly, late or never."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from components.doctor import check, disk, machine
from components.doctor.check import Check, Job, ask, clock_check, run
from components.doctor.disk import folder_checks, space_check
from components.doctor.machine import device_checks, machine_checks
from components.doctor.mlflow_server import mlflow_checks
from components.doctor.s3 import s3_checks
from components.doctor.versions import version_checks
from components.tracking.settings import TrackingSettings


@contextmanager
def http_server(answers: dict[str, tuple[int, bytes]], seconds_ahead: float = 0.0) -> Iterator[str]:
    """Answers by path, 404 elsewhere, with a clock that may be wrong."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path.partition("?")[0], (404, b""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + seconds_ahead, usegmt=True)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address that takes connections and never answers, and short limits."""
    for module in ("components.doctor.check", "components.doctor.s3", "components.doctor.mlflow_server"):
        monkeypatch.setattr(f"{module}.REQUEST_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def found(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-11111")


def test_an_error_and_a_job_without_end_stop_no_other_and_lose_nothing():
    def broken() -> Iterator[Check]:
        yield Check("MLflow", "first", "ok", "postgresql://me:planted@host/db")
        raise RuntimeError("key planted-secret-11111 was refused")

    def endless() -> Iterator[Check]:
        yield Check("storage", "before", "ok", "")
        time.sleep(30)

    def quick() -> Iterator[Check]:
        yield Check("versions", "python", "ok", "3")

    started = time.monotonic()
    checks = run([Job("MLflow", broken), Job("storage", endless), Job("versions", quick)], seconds=0.5)
    assert time.monotonic() - started < 5
    assert [(check.section, check.name, check.status) for check in checks] == [
        ("versions", "python", "ok"),
        ("storage", "before", "ok"),
        ("storage", "time limit", "failure"),
        ("MLflow", "first", "ok"),
        ("MLflow", "check", "failure"),
        ("clock", "clock", "skipped"),
    ]
    assert found(checks, "first").found == "postgresql://host/db"
    assert found(checks, "check").found == "RuntimeError: key *** was refused"


@pytest.mark.parametrize(
    ("ahead", "status", "part"),
    [
        (0.0, "ok", "within 5 s"),
        (60.0, "warning", "ahead of"),
        (-3600.0, "failure", "60 min behind"),
        (3600.0, "failure", "60 min ahead"),
    ],
)
def test_the_clock_of_a_server_is_compared(ahead: float, status: str, part: str):
    with http_server({"/": (403, b"no")}, ahead) as url:
        answer = ask(url + "/")
    assert answer.status == 403
    [checked] = clock_check("S3", answer)
    assert checked.status == status
    assert part in checked.found
    assert (checked.advice is None) == (status == "ok")
    assert "15 minutes" in (checked.advice or "") or status != "failure"


def test_versions_against_requirements():
    requirements = [
        "torch==1.0", "numpy", "fastapi<0.1", "no-such-library>=2", "pytest", "other; sys_platform == 'none'",
        "no-such-extra; extra == 'ray'", "typer<0.1; extra == 'dask'",
    ]  # fmt: skip
    checks = list(version_checks(requirements, ">=3.99"))
    failures = {check.name: check for check in checks if check.status == "failure"}
    assert set(failures) == {"python", "torch", "fastapi", "no-such-library", "typer"}
    assert failures["no-such-library"].found == "not installed"
    assert "pip install 'torch==1.0'" in failures["torch"].advice
    assert "Prefect 3.8.8" in failures["fastapi"].advice
    assert "0.151" in failures["fastapi"].advice
    assert found(checks, "libraries").found.startswith("2 ")


def test_this_environment_is_as_the_project_requires():
    assert [check for check in version_checks() if check.status == "failure"] == []


def test_a_local_root_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checks = list(folder_checks(str(tmp_path / "not" / "there")))
    assert [(check.name, check.status) for check in checks] == [("write", "ok"), ("commit", "ok")]
    assert not any(tmp_path.iterdir())

    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(disk.os, "link", refuse)
    commit = found(list(folder_checks(str(tmp_path))), "commit")
    assert commit.status == "failure"
    assert "another file system" in commit.advice
    assert found(list(folder_checks("/proc/none")), "write").status == "failure"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("free", "needed", "status"),
    [
        (10**12, None, "ok"), (10**9, None, "warning"), (10**6, None, "failure"),
        (10**12, 10**11, "ok"), (10**11 + 10**8, 10**11, "warning"), (10**10, 10**11, "failure"),
    ],
)  # fmt: skip
def test_a_disk_against_what_is_needed(
    free: int, needed: int | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    checked = space_check(str(tmp_path / "data"), needed)
    assert checked.status == status
    assert (checked.advice is None) == (status == "ok")


def test_no_gpu_is_fine_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.Path, "glob", lambda *arguments: iter(()))
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert found(list(device_checks("auto")), "GPU").status == "ok"
    assert found(list(device_checks("cuda")), "GPU").status == "failure"


def test_a_gpu_that_torch_cannot_use_is_a_failure_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA build" in found(list(device_checks("auto")), "GPU").advice
    assert found(list(device_checks("cpu")), "GPU").status == "ok"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    gpu = found(list(device_checks("cuda:0")), "GPU")
    assert gpu.status == "failure"
    assert "driver" in gpu.advice


def test_memory_and_threads_against_the_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in {"memory.max": "3000000000", "memory.current": "2000000000", "cpu.max": "50000 100000"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    checks = list(machine_checks(2 * 10**9))
    assert found(checks, "memory").found == "1.0 GB available, about 2.0 GB needed"
    assert found(checks, "memory").status == "warning"
    assert found(checks, "processors").advice.startswith("Set OMP_NUM_THREADS=1:")


def test_an_s3_server_that_is_away_or_silent_is_said_within_seconds(silent: str, monkeypatch: pytest.MonkeyPatch):
    for address, reason in (("http://127.0.0.1:9", "Connection refused"), (silent, "no answer within 1 s")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        started = time.monotonic()
        endpoint, rights = s3_checks("s3://acts/runs")
        assert time.monotonic() - started < 10
        assert (endpoint.status, rights.status) == ("failure", "skipped")
        assert reason in endpoint.found
        assert "AWS_ENDPOINT_URL" in endpoint.advice


def test_a_server_that_is_not_s3_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch):
    with http_server({"/": (200, b"hello")}) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        checks = list(s3_checks("s3://acts/runs"))
    assert [check.name for check in checks if check.status == "failure"] == ["list"]
    assert found(checks, "rights").found == "the server does not answer as S3 does"


HEALTHY = {"/health": (200, b"OK")}
BY_NAME = "/api/2.0/mlflow/experiments/get-by-name"


@pytest.mark.parametrize(
    ("answers", "name", "advice"),
    [
        ({}, "server", "address of an MLflow server"),
        (HEALTHY | {BY_NAME: (401, b"")}, "API", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (HEALTHY | {BY_NAME: (403, b"Invalid Host header")}, "API", "--allowed-hosts"),
        (HEALTHY | {BY_NAME: (403, b"no")}, "API", "right to read"),
        (HEALTHY | {BY_NAME: (200, b"{}"), "/version": (200, b"2.22.0")}, "version", "on the server"),
    ],
)
def test_what_is_wrong_with_an_mlflow_server_is_told_apart(answers: dict, name: str, advice: str):
    with http_server(answers) as url:
        checks = list(mlflow_checks(TrackingSettings(uri=url), "unused"))
    failure = next(check for check in checks if check.status == "failure")
    assert failure.name == name
    assert advice in failure.advice


def test_an_mlflow_server_or_database_that_is_away_is_said_within_seconds(silent: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    database = "postgresql+psycopg2://me:planted@127.0.0.1:9/mlflow"
    for address, reason in ((silent, "no answer within 1 s"), ("http://127.0.0.1:9", "refused"), (database, "refused")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        started = time.monotonic()
        checks = list(mlflow_checks(TrackingSettings(), "s3://acts/runs"))
        assert time.monotonic() - started < 10
        failure = next(check for check in checks if check.status == "failure")
        assert reason in failure.found
        assert failure.advice.startswith("Start the ")
        assert "planted" not in str(checks)


def test_a_bucket_cannot_hold_mlflows_database():
    [checked] = mlflow_checks(TrackingSettings(), "s3://acts/runs")
    assert checked.status == "failure"
    assert "MLFLOW_TRACKING_URI" in checked.advice


def test_a_sqlite_store_is_written_to_without_a_trace(tmp_path: Path):
    from components.tracking.store import connect

    settings = TrackingSettings()
    early = list(mlflow_checks(settings, str(tmp_path), shared=True))
    assert [(check.name, check.status) for check in early] == [("store", "ok"), ("database", "warning"), ("write", "skipped")]
    assert not any(tmp_path.iterdir())
    client = connect(settings, str(tmp_path))
    checks = list(mlflow_checks(settings, str(tmp_path)))
    assert [(check.name, check.status) for check in checks] == [("store", "ok"), ("write", "ok"), ("artifacts", "ok")]
    experiment = client.get_experiment_by_name(settings.experiment)
    assert experiment.tags == {}
    assert not list(tmp_path.rglob("*doctor*"))


def test_bytes_are_written_as_people_read_them():
    assert [check.human_bytes(count) for count in (5, 1500, 2.5e9, 1.2e13)] == ["5 B", "1.5 kB", "2.5 GB", "12.0 TB"]
