"""The whole line as a Prefect flow: `pipeline(config)`, one task per step, extraction as a flow of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from components import steps
from components.config import RunConfig
from components.planning import Plan, check, pinned
from components.training.checkpoint import Point
from flows.extraction import extract_on_its_runner, prepare_tokens

# Every step keeps its result under a digest of all that decides it; Prefect's own cache would only hide that.


@task(name="train", cache_policy=NO_CACHE)
def train(config: RunConfig, on_points: Callable[[list[Point]], None]) -> str:
    """Activation dataset -> SAE artifact; the checksum of its weights."""
    return str(steps.train(Plan(config), on_points)["weights_sha256"])


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(config: RunConfig) -> dict[str, Any]:
    """SAE artifact -> its metrics on held-out documents."""
    return dict(steps.evaluate(Plan(config))["metrics"])


@task(name="register", cache_policy=NO_CACHE)
def register(config: RunConfig, run: Any) -> dict[str, Any]:
    """SAE artifact and metrics -> a model version with an alias; version, alias and reason."""
    return steps.register(Plan(config), run)


@flow(name="pipeline", flow_run_name="{config.name}")
def pipeline(config: RunConfig) -> dict[str, Any]:
    """From a corpus to a registered SAE; the summary of the run."""
    config = pinned(config)
    plan = Plan(config)
    check(plan)
    seconds: dict[str, float] = {}
    with steps.tracked(
        plan, {steps.FLOW_RUN_TAG: str(flow_run.get_id()), "prefect.flow_run_name": str(flow_run.get_name())}
    ) as run:
        create_markdown_artifact(lineage(plan, run.run_id), key="mlflow-run")
        with _timed(seconds, "tokens"):
            prepare_tokens(config)
        with _timed(seconds, "extract"):
            extract_on_its_runner(config)
        with _timed(seconds, "train"):
            train(config, run.add_points)
        with _timed(seconds, "evaluate"):
            evaluate(config)
        with _timed(seconds, "register"):
            outcome = register(config, run)
    create_markdown_artifact(lineage(plan, run.run_id, outcome), key="model-version")
    return steps.summary(plan, {"mlflow_run": run.run_id, **outcome}, seconds, reused=False)


def lineage(plan: Plan, run_id: str, outcome: dict[str, Any] | None = None) -> str:
    """What the flow run's page shows of where its results are, in Markdown; MLflow's run names the flow run in turn."""
    rows = {"MLflow run": run_id, "activation dataset": plan.dataset_digest, "SAE": plan.sae_digest}
    if outcome is not None:
        rows["model version"] = f"models:/{outcome['registered_model']}/{outcome['model_version']}"
        rows["alias"] = f"{outcome['alias']}: {outcome['alias_reason']}"
    return "\n".join(f"- {name}: `{value}`" for name, value in rows.items())


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
