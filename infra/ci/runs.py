"""The flow runs of one CI job: checked, started, followed to their ends, or cancelled."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import yaml

from components.run.config import load_config, read_config, shipped_configs
from components.settings import UserError
from infra.ci.report import EXIT_CODES, Outcome, say
from infra.ci.server import Gone, Server, Stop, table_rows

CANCEL_SECONDS = 4.0
"""GitHub kills a cancelled job ten seconds after its first signal."""


@dataclass
class Retrain:
    """One configuration on its way."""

    config: str
    parameters: dict[str, Any]
    key: str
    """Idempotency key: the same one again finds the same flow run."""

    asked: bool = False
    """Whether the server may have a flow run of it."""

    run: UUID | None = None
    page: str | None = None
    shown: str = ""
    """The progress line printed last."""

    crashed: float | None = None
    """When it was first seen crashed (monotonic clock)."""

    outcome: Outcome | None = None


def checked(configs: Sequence[str], force: bool, commit: str | None, attempt: str) -> list[Retrain]:
    """The retrains of these configurations, once each; a Stop with code 2 and one sentence where one is not valid."""
    if not configs:
        raise Stop(2, "SAE_CONFIGS: no configuration is given; name YAML files or some of " + ", ".join(shipped_configs()))
    retrains = []
    for config in dict.fromkeys(configs):
        try:
            name = load_config(config).name
            tree = _tree(config)
            text = json.dumps(tree, sort_keys=True, allow_nan=False)
        except UserError as error:
            raise Stop(2, str(error) if config in str(error) else f"{config}: {error}") from error
        except (TypeError, ValueError) as error:
            raise Stop(2, f"{config}: it holds a value that JSON has not: {error}") from error
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        # The tree as it is written and not the validated one: what it leaves out is for the worker's version to decide.
        parameters = {"config": tree, "force": force, "commit": commit}
        retrains.append(Retrain(config, parameters, f"{attempt}-{name}-{digest}"))
    return retrains


def start(server: Server, retrains: Sequence[Retrain], commit: str | None) -> None:
    """Create the flow runs; where the deployment refuses one, those before it are cancelled and the Stop goes on."""
    tags = ["ci"] + ([f"commit:{commit[:12]}"] if commit else [])
    for retrain in retrains:
        retrain.asked = True
        try:
            retrain.run = server.start(retrain.parameters, tags, retrain.key).id
        except Stop as stop:
            if stop.exit_code != 2:
                raise
            retrain.outcome = Outcome(retrain.config, "Invalid", str(stop))
            cancel(server, retrains, f"{retrain.config} was not accepted")
            raise Stop(2, f"{retrain.config}: {stop}") from stop
        retrain.page = server.page(retrain.run)


def follow(server: Server, retrains: Sequence[Retrain], minutes: float, grace: float, pause: float) -> None:
    """Wait until each has its outcome, printing a line whenever a state changes; when the time is over the rest goes on."""
    deadline = time.monotonic() + minutes * 60
    while waiting := [retrain for retrain in retrains if retrain.outcome is None]:
        for retrain in waiting:
            _look(server, retrain, grace, late=time.monotonic() >= deadline)
        if any(retrain.outcome is None for retrain in retrains):
            time.sleep(pause)


def cancel(server: Server, retrains: Sequence[Retrain], why: str) -> None:
    """Cancel what was started and has not ended; what cannot be cancelled is said and left."""
    for retrain in retrains:
        if not retrain.asked or retrain.outcome is not None:
            continue
        try:
            if retrain.run is None:
                # The signal came between the request and its answer; the same key finds what the request created.
                retrain.run = server.start(retrain.parameters, ["ci"], retrain.key, patience=CANCEL_SECONDS).id
            server.cancel(retrain.run, CANCEL_SECONDS)
            reason = f"{why}, and the flow run told to end"
        except Exception as error:
            reason = f"{why}; the flow run could not be, and may go on: {error}"
        retrain.outcome = Outcome(retrain.config, "Cancelled", reason, retrain.page)
        say(f"{retrain.config}: {reason}")


def _look(server: Server, retrain: Retrain, grace: float, late: bool) -> None:
    """Read the flow run once and note what has changed, or how it ended."""
    assert retrain.run is not None
    try:
        state = server.read(retrain.run).state
    except Gone as gone:
        retrain.outcome = Outcome(retrain.config, "Failed", str(gone))
        return
    name, message = (state.name or state.type.value.title(), state.message or "") if state else ("Unknown", "")
    line = ", ".join(part for part in (f"{retrain.config}: {name}", message, retrain.page) if part)
    if line != retrain.shown:
        say(line)
        retrain.shown = line
    if state is not None and state.is_crashed():
        if retrain.crashed is None:
            retrain.crashed = time.monotonic()
        if time.monotonic() - retrain.crashed < grace and not late:
            return  # an automation may give it to another worker
    else:
        retrain.crashed = None
    if state is not None and state.is_final():
        verdict = "TimedOut" if name == "TimedOut" else state.type.value.title()
        if state.is_completed() and name in EXIT_CODES:
            verdict = name
        elif state.is_completed():
            verdict, message = "Failed", f"the flow ended as {name}, which is no verdict ({', '.join(EXIT_CODES)}) {message}"
        retrain.outcome = _outcome(server, retrain, verdict, message)
    elif late:
        hint = "; is a worker of its work pool running?" if name in ("Scheduled", "Late", "Pending") else ""
        reason = f"it was still {name} when the time to wait was over, and goes on{hint}"
        retrain.outcome = Outcome(retrain.config, "StillRunning", reason, retrain.page)


def _outcome(server: Server, retrain: Retrain, verdict: str, message: str) -> Outcome:
    assert retrain.run is not None
    found = server.artifacts(retrain.run, ["metrics", "gates", "mlflow-run"])
    return Outcome(
        config=retrain.config,
        verdict=verdict,
        reason=message or "the flow gave no reason",
        page=retrain.page,
        metrics=list(table_rows(found.get("metrics"))),
        gates=list(table_rows(found.get("gates"))),
        mlflow=str(found.get("mlflow-run") or ""),
    )


def _tree(config: str) -> dict[str, Any]:
    """What the file says, before any default is filled in; `load_config` has read and checked the same."""
    return yaml.safe_load(read_config(config)) or {}
