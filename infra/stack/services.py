"""The services of the stack: what runs, as whom, with which environment, and when it is ready.

They have the names, settings and order of `infra/compose.yaml`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from infra.stack import postgres, seaweed
from infra.stack.settings import ADMIN, POOLS, REPOSITORY, Stack

BIN = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class Service:
    name: str
    command: list[str]
    environment: dict[str, str]
    is_ready: Callable[[], bool]
    url: str | None = None
    """What people open."""
    user: str | None = None
    """None: whoever starts the stack."""
    after: tuple[str, ...] = ()
    """Services that must be ready before this one starts."""
    stop_seconds: int = 30
    """How long it may take to end; then it is killed."""
    stop_signal: str = "TERM"
    together: bool = False
    """It consists of several processes that outlive each other, and hold the port: they are to end together."""
    needs: tuple[int, ...] = ()
    """Ports that must be free before it starts for the first time."""


def services(stack: Stack) -> list[Service]:
    """In the order in which they start."""
    ports = stack.ports
    return [
        Service(
            name="s3",
            command=seaweed.command(stack.folder, ports),
            environment={},
            is_ready=lambda: seaweed.buckets_are_there(stack),
            url=stack.s3_url,
            needs=(ports.s3, ports.s3_master, ports.s3_volume, ports.s3_filer),
        ),
        Service(
            name="postgres",
            command=postgres.command(stack.postgres_folder, ports.postgres),
            environment={},
            user=postgres.owner(),
            is_ready=lambda: postgres.databases_are_there(ports.postgres, stack.secrets.postgres),
            stop_signal="INT",  # disconnects its clients; TERM would wait for them
            needs=(ports.postgres,),
        ),
        Service(
            name="mlflow",
            command=[
                str(BIN / "python"), "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1",
                "--port", str(ports.mlflow), "--workers", "2",
            ],
            environment=stack.mlflow_environment(),
            is_ready=lambda: answers(f"{stack.mlflow_url}/health"),
            url=stack.mlflow_url,
            after=("s3", "postgres"),
            together=True,
            needs=(ports.mlflow,),
        ),
        Service(
            name="prefect",
            command=[str(BIN / "python"), "-m", "prefect", "server", "start"],
            environment=stack.prefect_server_environment(),
            is_ready=lambda: answers(f"{stack.prefect_url}/health"),
            url=stack.prefect_url.removesuffix("/api"),
            after=("postgres",),
            needs=(ports.prefect,),
        ),
        *(
            Service(
                name=f"worker-{pool}",
                command=[
                    str(BIN / "python"), "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process",
                    "--name", f"worker-{pool}",
                ],
                environment=stack.worker_environment(),
                is_ready=lambda pool=pool: _has_a_worker(stack, pool),
                after=("s3", "mlflow", "prefect"),
                # What it runs is asked to end first, and a training puts a checkpoint.
                stop_seconds=60,
            )
            for pool in POOLS
        ),
    ]  # fmt: skip


def prepare(stack: Stack) -> None:
    """What must be in the folder before the first service starts."""
    seaweed.prepare(stack.folder, stack.secrets)
    postgres.initialise(stack.postgres_folder, stack.secrets.postgres)
    example = (REPOSITORY / "mlflow" / "basic_auth.ini").read_text(encoding="utf-8").splitlines()
    database = f"database_uri = {stack.mlflow_database}"
    lines = [database if line.startswith("database_uri") else line for line in example]
    (stack.folder / "basic_auth.ini").write_text("\n".join(lines) + "\n", encoding="utf-8")


def answers(url: str) -> bool:
    """Whether an HTTP server is there, whatever it says but that it is broken."""
    try:
        return httpx.get(url, timeout=3).status_code < 500
    except httpx.HTTPError:
        return False


def _has_a_worker(stack: Stack, pool: str) -> bool:
    place, login = f"{stack.prefect_url}/work_pools/{pool}/workers/filter", (ADMIN, stack.secrets.prefect)
    try:
        workers = httpx.post(place, json={}, auth=login, timeout=5).raise_for_status().json()
    except httpx.HTTPError:
        return False
    return any(worker["status"] == "ONLINE" for worker in workers)
