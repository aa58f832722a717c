"""`python -m infra.stack start|status|stop|register|environment`: the whole stack on one machine, without Docker.

`make stack`, `make stack-status` and `make stack-stop` call it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra.stack import postgres
from infra.stack.services import BIN, Service, prepare, services
from infra.stack.settings import REPOSITORY, Stack, load, load_or_make, port_is_free

if TYPE_CHECKING:
    from infra.stack.supervision import Supervisor

READY_SECONDS = 180
"""How long a service may take from its start until it is ready."""

# No pretty tracebacks: they show local variables, and those hold secrets.
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
console = Console(stderr=True, soft_wrap=True, highlight=False)

Folder = Annotated[Path, typer.Option("--folder", help="Where the stack keeps its data, logs and secrets.")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Trainings at the same time; 1 at first.")]
AtOnce = Annotated[
    int | None, typer.Option("--workers-at-once", min=1, help="Flow runs of a pool at the same time; 2 at first.")
]
HOME = REPOSITORY / ".stack"


@app.command()
def start(
    folder: Folder = HOME,
    free_ports: Annotated[bool, typer.Option("--free-ports", help="Ports that nobody uses, not the usual ones.")] = False,
    gpus: Gpus = None,
    at_once: AtOnce = None,
) -> None:
    """Start what does not run, wait until all of it is ready, register the deployments, and print the addresses."""
    started = time.monotonic()
    if postgres.tool("initdb") is None:
        _fail(postgres.MISSING)
    folder = folder.resolve()
    os.umask(0o077)  # of all that is made from here on
    try:
        with _alone(folder):
            supervisor = _supervisor(folder)
            running = supervisor.is_running()
            known = load(folder)
            place = known.postgres_folder if known and running else postgres.data_folder(folder)
            stack = load_or_make(folder, place, free_ports)
            everything = services(stack)
            if not running:
                _require_free_ports(everything)
                prepare(stack)
                supervisor.start(everything)
            _start(stack, supervisor, [service for service in everything if not service.name.startswith("worker-")])
            _register(stack, gpus, at_once)
            _start(stack, supervisor, [service for service in everything if service.name.startswith("worker-")])
    except (RuntimeError, TimeoutError) as error:
        _fail(str(error))
    console.print(f"The stack is up, after {time.monotonic() - started:.0f} s.")
    _print(stack, supervisor, everything)


@app.command()
def status(
    folder: Folder = HOME, as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False
) -> None:
    """Which services run and are ready. Exit code 1 where one is not."""
    stack = _known(folder)
    supervisor, everything = _supervisor(stack.folder), services(stack)
    rows = _states(supervisor, everything)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(stack, supervisor, everything, rows)
    if not all(row["ready"] for row in rows):
        raise typer.Exit(1)


@app.command()
def stop(folder: Folder = HOME) -> None:
    """Stop everything, workers first; data, secrets and ports stay for the next start."""
    stack = _known(folder)
    supervisor = _supervisor(stack.folder)
    with _alone(stack.folder):
        if not supervisor.is_running():
            console.print("The stack is not running.")
            return
        for service in reversed(services(stack)):
            console.print(f"stopping {service.name} ...", style="dim")
            supervisor.stop_service(service.name)
        supervisor.shut_down()
    console.print("The stack is stopped; `make stack` goes on with the same data.")


@app.command()
def register(folder: Folder = HOME, gpus: Gpus = None, at_once: AtOnce = None) -> None:
    """Pools, limits, deployments and automations: with the server of PREFECT_API_URL, or else with the stack's own."""
    if "PREFECT_API_URL" not in os.environ:
        os.environ.update(_known(folder).prefect_environment())
    from infra.stack import registration  # Prefect reads its settings when it is imported

    registration.register(gpus, at_once, lambda line: console.print(line, style="dim"))


@app.command()
def environment(folder: Folder = HOME) -> None:
    """Shell assignments for using the stack: `eval "$(python -m infra.stack environment)"`. They hold secrets."""
    import shlex

    for name, value in _known(folder).client_environment().items():
        print(f"export {name}={shlex.quote(value)}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that start or stop the same stack at once would each make secrets of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "command.lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(f"another command is starting or stopping the stack in {os.path.relpath(folder)}") from None


def _supervisor(folder: Path) -> Supervisor:
    # Not where the image of `infra/docker` registers deployments: it has no supervisord.
    from infra.stack.supervision import Supervisor

    return Supervisor(folder)


def _start(stack: Stack, supervisor: Supervisor, wanted: list[Service]) -> None:
    """Each as soon as what it needs is ready."""
    ready: set[str] = set()
    waiting: dict[str, float] = {}
    names = {service.name for service in wanted}
    while len(ready) < len(wanted):
        for service in wanted:
            if service.name not in waiting and names.isdisjoint(set(service.after) - ready):
                supervisor.start_service(service.name)
                waiting[service.name] = time.monotonic()
        for service in wanted:
            if service.name not in waiting or service.name in ready:
                continue
            state = supervisor.states()[service.name]["statename"]
            if state == "RUNNING" and service.is_ready():
                ready.add(service.name)
                console.print(f"{service.name} is ready", style="dim")
            elif state == "FATAL":
                raise RuntimeError(f"{service.name} does not start; the end of its log:\n{_log_end(stack, service.name)}")
            elif time.monotonic() - waiting[service.name] > READY_SECONDS:
                raise TimeoutError(f"{service.name} is not ready after {READY_SECONDS} s:\n{_log_end(stack, service.name)}")
        time.sleep(0.3)


def _register(stack: Stack, gpus: int | None, at_once: int | None) -> None:
    # A process of its own: Prefect reads its settings when it is imported.
    command = [sys.executable, "-m", "infra.stack", "register"]
    command += [f"--gpus={gpus}"] if gpus else []
    command += [f"--workers-at-once={at_once}"] if at_once else []
    environment = {**os.environ, **stack.prefect_environment(), **stack.client_environment()}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        console.print(done.stderr.strip(), style="dim", markup=False)
    if done.returncode != 0:
        raise RuntimeError(f"the deployments could not be registered: {done.stderr.strip()[-3000:]}")


def _require_free_ports(everything: list[Service]) -> None:
    taken = [(service.name, port) for service in everything for port in service.needs if not port_is_free(port)]
    if taken:
        holders = {found.laddr.port: found.pid for found in psutil.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
        listed = ", ".join(f"{port} ({name}, by process {holders.get(port) or 'of another user'})" for name, port in taken)
        raise RuntimeError(f"ports in use: {listed}; stop what uses them, or start a stack with --free-ports in a new --folder")


def _states(supervisor: Supervisor, everything: list[Service]) -> list[dict[str, Any]]:
    known = supervisor.states() if supervisor.is_running() else {}
    rows = []
    for service in everything:
        info = known.get(service.name, {"statename": "STOPPED", "pid": 0, "start": 0})
        runs = info["statename"] == "RUNNING"
        row = {"service": service.name, "state": info["statename"].lower(), "ready": runs and service.is_ready()}
        rows.append({**row, "pid": info["pid"] or None, "url": service.url})
    return rows


def _print(stack: Stack, supervisor: Supervisor, everything: list[Service], rows: list[dict[str, Any]] | None = None) -> None:
    table = Table("service", "state", "ready", "pid", "address")
    for row in rows or _states(supervisor, everything):
        ready = "[green]yes[/]" if row["ready"] else "[red]no[/]"
        table.add_row(row["service"], row["state"], ready, str(row["pid"] or ""), row["url"] or "")
    console.print(table)
    folder = os.path.relpath(stack.folder)
    option = "" if stack.folder == HOME else f" --folder {folder}"
    console.print(f"logs: {folder}/log; user and password of MLflow, keys of S3:")
    console.print(f'    eval "$({os.path.relpath(sys.executable)} -m infra.stack environment{option})"')
    console.print(f"then, for example:\n    {os.path.relpath(BIN / 'python')} -m infra.ci.run pipeline/quickstart")


def _known(folder: Path) -> Stack:
    found = load(folder.resolve())
    if found is None:
        _fail(f"there is no stack in {os.path.relpath(folder)}; `make stack` makes one")
    return found


def _log_end(stack: Stack, name: str) -> str:
    path = stack.folder / "log" / f"{name}.log"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return "\n".join(lines[-20:])


def _fail(sentence: str) -> Any:
    console.print("[bold red]error[/]", escape(sentence))
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
