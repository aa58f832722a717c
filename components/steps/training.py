"""Activation dataset -> coder."""

from __future__ import annotations

from collections.abc import Callable

from components.run.specification import Specification
from components.steps.extraction import require_dataset
from components.training import loop, process
from components.training.job import Point, TrainingRecord


def train(run: Specification, on_points: Callable[[list[Point]], None] = lambda points: None) -> TrainingRecord:
    """The record of the training, in this process."""
    require_dataset(run)
    return loop.train(run.training(), run.device, on_points)


def launch_training(run: Specification, on_points: Callable[[list[Point]], None] = lambda points: None) -> TrainingRecord:
    """`train` in a process of its own, which `execution.training_timeout_minutes` and a cancelled run really end."""
    if run.training_record() is not None:
        return train(run, on_points)
    require_dataset(run)
    minutes = run.config.execution.training_timeout_minutes
    return process.launch(run.training(), run.device, on_points, None if minutes is None else minutes * 60)


def training_tokens(run: Specification) -> int:
    """How many tokens the training reads: whole steps."""
    return run.config.training.steps * run.config.training.batch_size
