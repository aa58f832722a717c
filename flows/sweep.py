"""A sweep as a Prefect flow: children on one activation dataset, in lockstep here or in groups on many workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed

from components.hardware import resolve_device
from components.run.config import RunConfig
from components.run.specification import Specification
from components.sweeps.conduct import check_sweep, conduct
from components.sweeps.grid import Child, SweepSettings
from components.sweeps.record import SweepRecord
from components.sweeps.work import FAILURES, GiveUp, Group, evaluated, in_a_process, never
from components.training.job import Outcome, TrainingRecord
from flows import artifacts
from flows.mapping import RETRIED, devices, task_runner
from flows.runs import begin_with
from flows.training import require_training_limit, turn


@task(name="children", cache_policy=NO_CACHE, **RETRIED)
def train_children(specification: str, settings: SweepSettings) -> tuple[str, SweepRecord]:
    """Grid or study -> trained and measured children, in their turn; what is there is reused."""
    base = Specification.from_json(specification)
    with turn(base.config.execution.training_limit):
        return conduct(base, settings)


@task(name="group", cache_policy=NO_CACHE)
def train_group(specifications: Sequence[str], device: str, give_up: GiveUp) -> list[Outcome]:
    """Children that share their batches -> trained in lockstep and measured, by one worker. It is not tried again as it is:
    the sweep halves what has failed."""
    found = str(resolve_device(device))
    runs = [Specification.from_json(text).model_copy(update={"device_name": found}) for text in specifications]
    group = [Child({}, run) for run in runs]
    with turn(runs[0].config.execution.training_limit):
        outcomes = in_a_process(group, give_up)
    trained = [child for child, outcome in zip(group, outcomes, strict=True) if isinstance(outcome, TrainingRecord)]
    for _ in evaluated(trained):  # what fails, the sweep meets again, and marks
        pass
    return outcomes


@flow(name="sweep", flow_run_name="{config.title}")
def sweep(config: RunConfig, sweep: SweepSettings) -> SweepRecord:
    """The record of the sweep, which is also `sweep.json` under `sweeps/` of the storage root."""
    base = begin_with(config)
    check_sweep(base, sweep)
    require_training_limit(config.execution.training_limit)
    record = swept(base, sweep)[1]
    artifacts.sweep_points(record)
    return record


def swept(base: Specification, settings: SweepSettings) -> tuple[str, SweepRecord]:
    """Where the record is, and the record: by this process alone, or by workers on the task runner that the configuration
    names."""
    execution = base.config.execution
    if execution.runner == "threads" and execution.workers == 1:
        return train_children(base.to_json(), settings)
    return _on_workers.with_options(task_runner=task_runner(execution))(base.config.name, base.to_json(), settings)


@flow(name="groups", flow_run_name="{name}")
def _on_workers(name: str, specification: str, settings: SweepSettings) -> tuple[str, SweepRecord]:
    base = Specification.from_json(specification)
    workers = base.config.execution.workers
    here = base.config.execution.runner == "threads"

    def train(groups: Sequence[Group], give_up: GiveUp) -> Iterator[tuple[Group, list[Outcome] | Exception]]:
        places = devices(base.config.device, workers)
        futures: dict[Any, Group] = {}
        for number, group in enumerate(groups):
            sent = [child.run.to_json() for child in group]
            futures[train_group.submit(sent, places[number % workers], give_up if here else never)] = group
        for future in as_completed(list(futures)):
            yield futures[future], _result(future)

    return conduct(base, settings, train, workers)


def _result(future: Any) -> list[Outcome] | Exception:
    try:
        return future.result()
    except FAILURES as error:
        return error
    except OSError:  # a store that is away is no child's fault
        raise
    except Exception as error:  # each runner has its own for a worker that is gone
        return RuntimeError(f"its worker was lost: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
