"""`sae doctor`: everything that a run relies on, checked before it, with what to do about each failure."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flows.cli.terminal import AsJson, Overrides, command

if TYPE_CHECKING:
    from components.doctor.check import Check
    from components.run.config import RunConfig

_HEAVY = ("components.run.estimate", "components.doctor.mlflow_server", "prefect.settings", "boto3")
_PLAN_SECONDS = 12.0  # a large corpus is hashed by whoever plans with it first
_COLOURS = {"ok": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}
MaybeConfig = Annotated[
    str | None,
    typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped configuration: checked for what it needs."),
]


def doctor(config: MaybeConfig = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check versions, storage, servers, GPU, disk and clock, and say what to do about each failure.

    With CONFIG: its storage root, its MLflow store, and whether disk and memory suffice for it. What is written to prove a
    right is removed again. Exit code 1 where a check failed.
    """
    with command(as_json) as show:
        from components.run.config import load_config

        # Without CONFIG an empty one: the defaults, SAE_STORAGE_ROOT and the other variables of this machine.
        settings = load_config(config or os.devnull, overrides or ())
        Console(stderr=True).print("Checking ...", style="dim")
        checks = _checks(settings, sized=config is not None)
        counted = {f"{status}s": sum(check.status == status for check in checks) for status in ("failure", "warning")}
        show({"checks": [asdict(check) for check in checks], **counted}, _print_checks)
        if counted["failures"]:
            raise typer.Exit(1)


def _checks(config: RunConfig, sized: bool) -> list[Check]:
    from components import storage
    from components.doctor.check import Job, run
    from components.doctor.disk import folder_checks
    from components.doctor.machine import device_checks
    from components.doctor.prefect_server import prefect_checks
    from components.doctor.s3 import s3_checks
    from components.doctor.versions import version_checks

    root = config.storage.root
    # Neither in the time limit nor in several threads at once; one that cannot be imported fails again in its own job.
    for name in _HEAVY:
        with suppress(Exception):
            import_module(name)
    return run(
        [
            Job("versions", version_checks),
            Job("storage", lambda: folder_checks(root) if storage.is_local(root) else s3_checks(root)),
            Job("storage", lambda: _room(config, sized)),
            Job("MLflow", lambda: _mlflow(config)),
            Job("Prefect", lambda: prefect_checks(config.execution.training_limit)),
            Job("device", lambda: device_checks(config.device)),
        ]
    )


def _mlflow(config: RunConfig) -> Iterator[Check]:
    from components.doctor.mlflow_server import mlflow_checks
    from components.doctor.prefect_server import api_url

    shared = config.execution.runner != "threads" or bool(api_url())
    return mlflow_checks(config.tracking, config.storage.root, shared)


def _room(config: RunConfig, sized: bool) -> Iterator[Check]:
    """Disk and memory; where a configuration was given, against what `sae plan` says that it takes."""
    from components import storage
    from components.doctor.disk import space_check
    from components.doctor.machine import machine_checks

    local = storage.is_local(config.storage.root)
    plan = (yield from _planned(config, local)) if sized else None
    needed = None if plan is None else _needed_bytes(config, plan, local)
    if local:
        yield space_check(str(storage.local_path(config.storage.root)), needed)
    else:
        yield space_check(tempfile.gettempdir(), needed, "TMPDIR")
    if config.storage.cache is not None:
        yield space_check(config.storage.cache, config.storage.cache_bytes, "storage.cache")
    yield from machine_checks(None if plan is None else max(plan["memory_bytes"].values()))


def _planned(config: RunConfig, local: bool) -> Generator[Check, None, dict[str, Any] | None]:
    """What `sae plan` says; None, and why, where that fails or takes long."""
    from components.doctor.check import Check, explained
    from components.run.estimate import estimate
    from components.run.specification import resolve
    from components.settings import UserError
    from components.storage.retries import patience

    if not local:  # what a bucket holds already is not asked: only scratch space is needed here for it
        away = config.storage.model_copy(update={"root": "/nonexistent"})
        config = config.model_copy(update={"storage": away})
    outcome: list[dict[str, Any] | Exception] = []

    def work() -> None:
        try:
            with patience(0):
                outcome.append(estimate(resolve(config)))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_PLAN_SECONDS)
    if not outcome:
        found = f"takes longer than {_PLAN_SECONDS:.0f} s; `sae plan` says what disk and memory are needed"
        yield Check("storage", "plan", "skipped", found)
        return None
    [result] = outcome
    if isinstance(result, Exception):
        said = str(result) if isinstance(result, UserError) else explained(result)
        advice = "Correct the configuration, or the place that it names; `sae plan` says the same."
        yield Check("storage", "plan", "failure", said, advice)
        return None
    return result


def _needed_bytes(config: RunConfig, plan: dict[str, Any], local: bool) -> int:
    """On the disk of a local root, what is not there yet; for a bucket, the shards that are staged at the same time."""
    stored, sae = plan["activations"], plan["sae"]
    checkpoint = 0 if sae["exists"] else 16 * sae["parameters"]  # weights, Adam's moments, and the copy being written
    if local:
        return int((0 if stored["exists"] else stored["peak_bytes"]) + checkpoint)
    rows = min(stored["tokens"], config.activations.rows_per_shard)
    return int(max(config.activations.shuffle_workers * rows * stored["bytes_per_token"], checkpoint))


def _print_checks(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "check", "", "found, and what to do", title="sae doctor")
    section = None
    for check in result["checks"]:
        if check["section"] != section and section is not None:
            table.add_section()
        first = check["section"] != section
        section = check["section"]
        found = Text(check["found"])
        if check["advice"]:
            found.append(f"\n{check['advice']}", style="bold")
        status = Text(check["status"], style=_COLOURS[check["status"]])
        table.add_row(section if first else "", Text(check["name"]), status, found)
    Console().print(table)
    failures, warnings = result["failures"], result["warnings"]
    print(f"{failures} failed, {warnings} to look at" if failures or warnings else "all is well")
