"""Activation dataset -> coder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components import storage
from components.run.specification import Specification
from components.steps.online import data_for
from components.training import divergence, loop, process, profiling
from components.training.job import Point, Training, TrainingRecord
from components.training.parallel.ranks import joined, speaks, started_by_torchrun

logger = logging.getLogger(__name__)


def train(
    run: Specification,
    on_points: Callable[[list[Point]], None] = lambda points: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingRecord:
    """The record of the training, in this process, which may be one of those that torchrun has started; where
    `execution.training` asks for more and it is not, they are started here. should_stop: see `loop.train`."""
    ranks = run.config.execution.training
    if ranks.size > 1 and not started_by_torchrun() and run.training_record() is None:
        return launch_training(run, on_points)
    with prepared(run) as job, data_for([run]) if speaks() else nullcontext():
        if not started_by_torchrun():
            return loop.train(job, run.device, on_points, should_stop)
        with joined(ranks, run.device) as (mesh, device):
            return loop.train(job, device, on_points, should_stop, mesh)


def launch_training(run: Specification, on_points: Callable[[list[Point]], None] = lambda points: None) -> TrainingRecord:
    """`train` in a process of its own, or in those of `execution.training`, which `execution.training_timeout_minutes` and a
    cancelled run really end."""
    if run.training_record() is not None:
        return train(run, on_points)
    minutes = run.config.execution.training_timeout_minutes
    with prepared(run) as job, data_for([run]):
        return process.launch(
            job, run.device, on_points, None if minutes is None else minutes * 60, run.config.execution.training
        )


def replay(run: Specification) -> dict[str, Any]:
    """What the step comes to, run again, by which the training diverged; as plain JSON."""
    with prepared(run) as job:
        return divergence.replay(job, run.device).as_json()


def profile(run: Specification) -> dict[str, Any]:
    """Where the time of a step goes; the trace lies beside the trainings, or in the current folder where those are on S3."""
    root = Path(run.config.storage.root) if storage.is_local(run.config.storage.root) else Path.cwd()
    with prepared(run) as job, data_for([run], again=True):
        return profiling.profile_steps(job, run.device, root / "profiles" / f"{run.config.name}-{job.digest[:16]}.json")


@contextmanager
def prepared(run: Specification) -> Iterator[Training]:
    """The training, with what it starts from in a folder of this machine."""
    job = run.training()
    if job.start is None or run.training_record() is not None:
        yield job
        return
    logger.info("train: %s", run.start_said)
    if not job.start.location.startswith("models:/"):
        yield job
        return
    from components.registry.download import registered_sae

    with TemporaryDirectory(prefix="sae-start-") as scratch:
        settings, root, location = run.config.tracking, run.config.storage.root, job.start.location
        folder = registered_sae(settings, root, location, Path(scratch), "training.start_from")
        yield replace(job, start=job.start.model_copy(update={"location": str(folder)}))


def training_tokens(run: Specification) -> int:
    """How many tokens the training reads: whole steps."""
    return run.config.training.steps * run.config.training.batch_size
