"""A sweep as it was asked for: a grid, or a study."""

from __future__ import annotations

from components.run.specification import Specification
from components.settings import UserError
from components.sweeps.grid import SweepSettings, children
from components.sweeps.record import SweepRecord
from components.sweeps.study import check_study, study
from components.sweeps.sweep import sweep
from components.sweeps.work import Trainer, one_after_another


def check_sweep(base: Specification, settings: SweepSettings) -> None:
    """A UserError for what is no good in it: a mistake now, and not after an extraction of hours."""
    if settings.study is None:
        children(base, settings.grid)
        return
    check_study(base, settings.study)
    runner = base.config.execution.runner
    if settings.study.pruner != "none" and runner != "threads":
        raise UserError(
            f"study.pruner: '{settings.study.pruner}' hears from trainings on this machine alone, and execution.runner is "
            f"'{runner}'; use none, or threads"
        )


def conduct(
    base: Specification, settings: SweepSettings, train: Trainer = one_after_another, workers: int = 1
) -> tuple[str, SweepRecord]:
    """Where its record is, and the record. train and workers: see `sweep`."""
    check_sweep(base, settings)
    if settings.study is not None:
        return study(base, settings.study, settings.memory_bytes, train, workers)
    return sweep(base, settings.grid, settings.memory_bytes, train, workers)
