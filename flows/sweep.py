"""A sweep as a Prefect flow: every combination of a grid's values on one activation dataset."""

from __future__ import annotations

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from components.run.config import RunConfig
from components.run.specification import Specification
from components.sweeps.grid import SweepSettings, children
from components.sweeps.record import SweepRecord
from components.sweeps.sweep import sweep as run_sweep
from flows import artifacts
from flows.mapping import RETRIED
from flows.runs import begin_with
from flows.training import require_training_limit, turn


@task(name="children", cache_policy=NO_CACHE, **RETRIED)
def train_children(specification: str, settings: SweepSettings) -> SweepRecord:
    """Grid -> trained and measured children, in their turn; what is there is reused."""
    base = Specification.from_json(specification)
    with turn(base.config.execution.training_limit):
        return run_sweep(base, settings.grid, settings.memory_bytes)[1]


@flow(name="sweep", flow_run_name="{config.title}")
def sweep(config: RunConfig, sweep: SweepSettings) -> SweepRecord:
    """The record of the sweep, which is also `sweep.json` under `sweeps/` of the storage root."""
    base = begin_with(config)
    children(base, sweep.grid)  # a grid that is no good is a mistake now, and not after an extraction of hours
    require_training_limit(config.execution.training_limit)
    record = train_children(base.to_json(), sweep)
    artifacts.sweep_points(record)
    return record
