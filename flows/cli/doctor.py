"""`sae doctor`: everything that a run relies on, checked before it, with what to do about each failure."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from flows.cli.terminal import AsJson, Overrides, command, terminal

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
        terminal(stderr=True).print("Checking ...", style="dim")
        from components.doctor.checks import checks

        found = checks(settings, sized=config is not None)
        counted = {f"{status}s": sum(check.status == status for check in found) for status in ("failure", "warning")}
        show({"checks": [asdict(check) for check in found], **counted}, _print_checks)
        if counted["failures"]:
            raise typer.Exit(1)


def _print_checks(result: dict[str, Any]) -> None:
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
    terminal().print(table)
    failures, warnings = result["failures"], result["warnings"]
    print(f"{failures} failed, {warnings} to look at" if failures or warnings else "all is well")
