"""What `sae doctor` checks for a configuration: every section's checks, and disk and memory against what its plan takes."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

from components import storage
from components.activations.dataset.inventory import sinks_warnings
from components.activations.dataset.manifest import read_manifest
from components.doctor.check import Check, Job, explained, run
from components.doctor.disk import folder_checks, space_check
from components.doctor.machine import device_checks, machine_checks
from components.doctor.prefect_server import api_url, prefect_checks
from components.doctor.s3 import s3_checks
from components.doctor.versions import version_checks
from components.run.config import RunConfig
from components.settings import UserError
from components.storage.retries import patience

_HEAVY = ("components.run.estimate", "components.doctor.mlflow_server", "prefect.settings", "boto3")
_PLAN_SECONDS = 12.0  # a large corpus is hashed by whoever plans with it first


def checks(config: RunConfig, sized: bool) -> list[Check]:
    """Everything that a run of `config` relies on, by section. sized: disk and memory against what its plan takes."""
    root = config.storage.root
    # Neither in the time limit nor in several threads at once; one that cannot be imported fails again in its own job.
    for name in _HEAVY:
        with suppress(Exception):
            import_module(name)
    return run(
        [
            Job("versions", version_checks),
            Job("storage", lambda: folder_checks(root) if storage.is_local(root) else s3_checks(root)),
            Job("storage", lambda: room_checks(config, sized)),
            Job("MLflow", lambda: _mlflow(config)),
            Job("Prefect", lambda: prefect_checks(config.execution.training_limit)),
            Job("device", lambda: device_checks(config.device)),
        ]
    )


def _mlflow(config: RunConfig) -> Iterator[Check]:
    from components.doctor.mlflow_server import mlflow_checks  # a broken MLflow must not hide the other sections

    shared = config.execution.runner != "threads" or bool(api_url())
    return mlflow_checks(config.tracking, config.storage.root, shared)


def room_checks(config: RunConfig, sized: bool) -> Iterator[Check]:
    """Disk and memory; `sized` against what `sae plan` says that the configuration takes."""
    local = storage.is_local(config.storage.root)
    plan = (yield from _planned(config, local)) if sized else None
    needed = None if plan is None else _needed_bytes(config, plan, local)
    if local:
        yield space_check(str(storage.local_path(config.storage.root)), needed)
    else:
        yield space_check(tempfile.gettempdir(), needed, "TMPDIR")
    if config.storage.cache is not None:
        yield space_check(config.storage.cache, config.storage.cache_bytes, "storage.cache")
    if plan is not None and local:
        yield from _sinks(plan["activations"]["url"])
    yield from machine_checks(None if plan is None else max(plan["memory_bytes"].values()))


def _sinks(dataset: str) -> Iterator[Check]:
    """Whether a few tokens of the dataset decide everything, where it is there."""
    manifest = read_manifest(dataset)
    if manifest is None:
        return
    for warning in sinks_warnings(manifest):
        yield Check("storage", "activations", "warning", *warning.split("; ", 1))


def estimated(config: RunConfig) -> dict[str, Any]:
    """What `sae plan` says of the configuration."""
    from components.run.estimate import estimate
    from components.run.specification import resolve

    with patience(0):
        return estimate(resolve(config))


def _planned(config: RunConfig, local: bool) -> Generator[Check, None, dict[str, Any] | None]:
    """What `sae plan` says; None, and why, where that fails or takes long."""
    if not local:  # what a bucket holds already is not asked: only scratch space is needed here for it
        config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": "/nonexistent"})})
    outcome: list[dict[str, Any] | Exception] = []

    def work() -> None:
        try:
            outcome.append(estimated(config))
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
