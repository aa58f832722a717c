"""Work cut into shares, each of them a Prefect task: where the tasks run, what each gets, and when one is tried again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from prefect.client.orchestration import get_client
from prefect.futures import wait
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from components.run.config import ExecutionSettings
from components.settings import UserError
from components.training.process import TrainingTimeout


def worth_another_try(task: Any, task_run: Any, state: Any) -> bool:
    """A worker that is lost, a store that was away for too long; not a mistake that only the user can mend, a training that
    diverged (it would again), or one that took its time."""
    return not isinstance(state.result(raise_on_failure=False), UserError | FloatingPointError | TrainingTimeout)


_SENT = (
    "PREFECT_API_URL", "PREFECT_LOGGING_EXTRA_LOGGERS", "PREFECT_CLIENT_MAX_RETRIES", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION", "AWS_REGION",
)  # fmt: skip
"""What the workers of a cluster are told of this process's environment."""
RETRIED: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": 10,
    "retry_jitter_factor": 1.0,
    "retry_condition_fn": worth_another_try,
}
"""Options of a task that works on a share."""


def task_runner(settings: ExecutionSettings) -> TaskRunner[Any]:
    """Threads in this process, or a Ray or Dask cluster; a UserError where its package is not installed."""
    if settings.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=settings.workers)
    # Workers elsewhere report to the server of this run, which may be a temporary one that only this process knows.
    with get_client(sync_client=True) as client:
        os.environ["PREFECT_API_URL"] = str(client.api_url).rstrip("/")
    try:
        if settings.runner == "ray":
            from prefect_ray import RayTaskRunner

            # Ray writes it into a log that everybody reads: no secrets. Workers on this machine inherit ours, and the machines
            # of a cluster bring their own.
            environment = {name: os.environ[name] for name in _SENT if name in os.environ}
            ray: dict[str, Any] = {"runtime_env": {"env_vars": environment}}
            if settings.address is None:
                # without an address Ray would join a cluster that it finds on this machine
                ray |= {"address": "local", "num_cpus": settings.workers, "include_dashboard": False}
            return RayTaskRunner(address=settings.address, init_kwargs=ray)
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise UserError(
            f"execution.runner: '{settings.runner}' needs the package {error.name}; install sae-foundry[{settings.runner}]"
        ) from error
    if settings.address is not None:
        return DaskTaskRunner(address=settings.address)
    local = {"n_workers": settings.workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=local)


def shares(items: int, parts: int) -> list[range]:
    """`items` in at most `parts` neighbouring ranges of about the same length."""
    edges = [items * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(edges) if low < high]


def devices(name: str, workers: int) -> list[str]:
    """A device for each: workers on one machine with several GPUs take one each."""
    count = torch.cuda.device_count()
    return [f"cuda:{worker % count}" if name == "auto" and count > 1 else name for worker in range(workers)]


def finished(futures: Iterable[Any]) -> list[Any]:
    """What the tasks gave, once all of them have ended; the error of the first that failed."""
    listed = list(futures)
    wait(listed)
    return [future.result() for future in listed]
