"""A sweep over a grid: its record and findings, under one MLflow run. Killed and called again, it goes on."""

from __future__ import annotations

from typing import Any

from components import steps, storage
from components.run.config import flattened
from components.run.specification import Specification
from components.settings import UserError, digest
from components.sweeps.grid import Grid, children
from components.sweeps.record import SweepRecord
from components.sweeps.report import log_report
from components.sweeps.work import Trainer, Work, one_after_another


def sweep_url(base: Specification, grid: Grid) -> str:
    return storage.join(base.config.storage.root, "sweeps", f"{base.config.name}-{sweep_digest(base, grid)}")


def sweep_digest(base: Specification, grid: Grid) -> str:
    return digest(["sweep", {field: list(values) for field, values in grid.items()}, base.run_digest])


def sweep(
    base: Specification,
    grid: Grid,
    memory_bytes: int | None = None,
    train: Trainer = one_after_another,
    workers: int = 1,
) -> tuple[str, SweepRecord]:
    """Where its record is, and the record. memory_bytes: that coders in lockstep may take together, of each worker; most of
    what is free where it is not given. workers: that `train` trains groups on at the same time. A UserError for a grid that
    is no good, before any work."""
    require_one_process(base)
    require_one_reader(base, workers)
    everyone = children(base, grid)
    url, key = sweep_url(base, grid), sweep_digest(base, grid)
    steps.extract(base)
    with storage.claimed(url), parent_run(base, key, {f"grid.{field}": list(grid[field]) for field in grid}) as parent:
        work = Work(base, url, key, parent.run_id, train, memory_bytes, workers)
        work.do(everyone)
        record = work.put()
        close(record, url, base, parent)
    return url, record


def require_one_process(base: Specification) -> None:
    if base.config.execution.training.size > 1:
        raise UserError(
            "execution.training: a sweep trains its coders in lockstep in one process, and not each in several; accepted is 1 "
            "for data_parallel and feature_parallel"
        )


def require_one_reader(base: Specification, workers: int) -> None:
    if base.config.activations.mode == "online" and workers > 1:
        raise UserError(
            f"execution.workers: {workers} of them would each wait for their turn with the generations of activations.mode "
            "'online', which one training reads at a time; accepted is 1"
        )


def parent_run(base: Specification, key: str, varied: dict[str, Any]) -> Any:
    """The MLflow run that the children are under."""
    from components.tracking.runs import tracked_run

    config = base.config
    parameters = {**flattened(config.model_dump(mode="json")), **varied}
    tags = {"sae.kind": "sweep", "sae.dataset_digest": base.dataset_digest}
    return tracked_run(config.tracking, config.storage.root, f"sweep of {config.name}", key, parameters, tags, base.code)


def close(record: SweepRecord, url: str, base: Specification, parent: Any) -> None:
    """Counts, laws and pictures into the parent's run, and the page of the sweep to `url`."""
    losses = [point.loss for point in record.finished if point.loss is not None]
    counts = {
        "children": len(record.points),
        "finished": len(record.finished),
        "training_seconds": record.seconds,
        **({"best_loss": min(losses)} if losses else {}),
    }
    parent.log_evaluation(counts, "sweep")
    log_report(record, url, base.config, parent)
