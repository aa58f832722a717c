"""Extraction as a Prefect flow: its chunks and shards as mapped tasks, on the task runner of the user's choice."""

from __future__ import annotations

import dataclasses
import os
from itertools import pairwise
from typing import Any

import torch
from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import wait
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from components import steps, storage
from components.activations import extraction
from components.activations.work import Extraction
from components.config import ExecutionSettings, RunConfig
from components.hardware import resolve_device
from components.planning import Plan, check, pinned
from components.settings import UserError

# Every step keeps its result under a digest of all that decides it; Prefect's own cache would only hide that.


def _worth_another_try(task: Any, task_run: Any, state: Any) -> bool:
    """A worker that is lost, a store that was away for too long; not a mistake that only the user can mend."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


_RETRIES, _RETRY_SECONDS = 2, 10


@task(name="tokens", cache_policy=NO_CACHE)
def prepare_tokens(config: RunConfig) -> dict[str, Any]:
    """Corpus -> token dataset; its manifest."""
    return steps.prepare_tokens(Plan(config))


@task(
    name="scatter",
    cache_policy=NO_CACHE,
    retries=_RETRIES,
    retry_delay_seconds=_RETRY_SECONDS,
    retry_jitter_factor=1.0,
    retry_condition_fn=_worth_another_try,
)
def scatter(work: Extraction, device: str, chunks: range) -> None:
    """Token sequences -> language model -> chunks of rows, scattered over buckets."""
    extraction.scatter(work, resolve_device(device), chunks)


@task(
    name="shuffle",
    cache_policy=NO_CACHE,
    retries=_RETRIES,
    retry_delay_seconds=_RETRY_SECONDS,
    retry_jitter_factor=1.0,
    retry_condition_fn=_worth_another_try,
)
def shuffle(work: Extraction, buckets: range) -> None:
    """Buckets -> shards."""
    extraction.gather(work, buckets)


@flow(name="extract", flow_run_name="{config.name}")
def extract(config: RunConfig) -> int:
    """From a corpus to an activation dataset; the number of stored tokens."""
    config = pinned(config)
    plan = Plan(config)
    check(plan, only_data=True)
    work = plan.extraction(prepare_tokens(config))
    with storage.exclusive(work.url):
        manifest = extraction.finish(work)
        if manifest is None:
            extraction.prepare(work)
            workers = config.execution.workers
            sent = unmapped(dataclasses.replace(work, source=dataclasses.replace(work.source)))  # without what is cached
            devices = [_device(config.device, worker) for worker in range(workers)]
            spans = _spans(work.chunks, workers)
            _finished(scatter.map(sent, devices[: len(spans)], spans))
            _finished(shuffle.map(sent, _spans(work.buckets, workers)))
            manifest = extraction.commit(work)
    return manifest.tokens


def extract_on_its_runner(config: RunConfig) -> int:
    """The flow `extract` with the task runner that the configuration names."""
    return extract.with_options(task_runner=task_runner(config.execution))(config)


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

            environment = {name: value for name, value in os.environ.items() if name.startswith(("PREFECT_", "AWS_"))}
            ray: dict[str, Any] = {"runtime_env": {"env_vars": environment}}
            if settings.address is None:
                ray |= {"num_cpus": settings.workers, "include_dashboard": False}
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


def _spans(items: int, parts: int) -> list[range]:
    """`items` in at most `parts` neighbouring ranges of about the same length."""
    edges = [items * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(edges) if low < high]


def _device(name: str, worker: int) -> str:
    """Workers on one machine with several GPUs take one each."""
    count = torch.cuda.device_count()
    return f"cuda:{worker % count}" if name == "auto" and count > 1 else name


def _finished(futures: Any) -> None:
    wait(futures)
    for future in futures:
        future.result()
