"""The whole line as a Prefect flow: `pipeline(config)`, one task or flow per step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from components import steps
from components.run.config import RunConfig
from components.run.planning import Plan, check, pinned
from flows import artifacts
from flows.evaluation import evaluate_on_its_runner
from flows.extraction import extract_on_its_runner, prepare_tokens
from flows.mapping import RETRIED
from flows.promotion import announce
from flows.runs import begin, lineage_tags
from flows.training import require_training_limit, train

# Every step keeps its result under a digest of all that decides it; Prefect's own cache would only hide that.


@task(name="register", cache_policy=NO_CACHE, **RETRIED)
def register(config: RunConfig, run: Any) -> dict[str, Any]:
    """SAE artifact and metrics -> a model version with an alias; version, alias and reason."""
    return steps.register(Plan(config), run)


@flow(name="pipeline", flow_run_name="{config.name}")
def pipeline(config: RunConfig) -> dict[str, Any]:
    """From a corpus to a registered SAE; the summary of the run."""
    begin()
    config = pinned(config)
    plan = Plan(config)
    check(plan)
    require_training_limit(config.execution.training_limit)
    seconds: dict[str, float] = {}
    with steps.tracked(plan, lineage_tags()) as run:
        artifacts.mlflow_run(plan, run.run_id, run.address)
        with _timed(seconds, "tokens"):
            prepare_tokens(config)
        with _timed(seconds, "extract"):
            extract_on_its_runner(config)
        with _timed(seconds, "train"):
            train(config, run.add_points)
        with _timed(seconds, "evaluate"):
            evaluate_on_its_runner(config)
        with _timed(seconds, "register"):
            outcome = register(config, run)
        announce(config, outcome)
    summary = steps.summary(plan, {"mlflow_run": run.run_id, **outcome}, seconds, reused=False)
    artifacts.verdict(plan, summary)
    return summary


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
