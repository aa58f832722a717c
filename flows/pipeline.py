"""The whole line as a Prefect flow: `pipeline(config)`, one task or flow per step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from components import steps
from components.registry.records import Outcome
from components.run.config import RunConfig
from components.run.specification import Specification
from components.steps.outcome import Summary
from flows import artifacts
from flows.evaluation import evaluated
from flows.extraction import extracted, prepare_tokens
from flows.interpretation import interpreted
from flows.mapping import RETRIED
from flows.promotion import announce
from flows.runs import begin, begin_with, lineage_tags
from flows.training import require_training_limit, train

# Every step keeps its result under a digest of all that decides it; Prefect's own cache would only hide that.


@task(name="register", cache_policy=NO_CACHE, **RETRIED)
def register(specification: str, open_run: Any) -> Outcome:
    """SAE artifact and metrics -> a model version with an alias; version, alias and reason."""
    return steps.register(Specification.from_json(specification), open_run)


@flow(name="pipeline", flow_run_name="{config.title}")
def pipeline(config: RunConfig) -> Summary:
    """From a corpus to a registered SAE; the summary of the run."""
    return line(begin_with(config))


@flow(name="pipeline", flow_run_name="{name}")
def pipeline_of(name: str, specification: str) -> Summary:
    """`pipeline` of a run that is resolved and checked already."""
    begin()
    return line(Specification.from_json(specification))


def line(run: Specification) -> Summary:
    """All steps, within a flow run."""
    require_training_limit(run.config.execution.training_limit)
    seconds: dict[str, float] = {}
    sent = run.to_json()
    with steps.tracked(run, lineage_tags()) as open_run:
        artifacts.mlflow_run(run, open_run.run_id, open_run.address)
        with _timed(seconds, "tokens"):
            prepare_tokens(sent)
        with _timed(seconds, "extract"):
            extracted(run)
        with _timed(seconds, "train"):
            train(sent, open_run.add_points)
        with _timed(seconds, "evaluate"):
            evaluated(run)
        with _timed(seconds, "interpret"):
            interpreted(run)
            artifacts.features(run)
        with _timed(seconds, "register"):
            outcome = register(sent, open_run)
        announce(run, outcome)
    summary = steps.summary(run, outcome, seconds, reused=False)
    artifacts.verdict(run, outcome)
    return summary


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
