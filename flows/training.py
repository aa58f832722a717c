"""Training as a Prefect task and flow: in a process of its own, in its turn, with its progress on the page of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from httpx import TransportError
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random_exponential

from components import steps
from components.run.config import RunConfig
from components.run.specification import Specification
from components.settings import UserError
from components.training.job import Point
from flows.mapping import RETRIED
from flows.progress import training_progress
from flows.runs import begin_with, lineage_tags

LEASE_SECONDS = 120
"""How long the turn of a machine that died is kept from the next training."""
SERVER_PATIENCE_SECONDS = 600
"""How long a training that waits for its turn waits for a server that is away."""

# Under `components`, whose logs the flow run's page shows.
logger = logging.getLogger("components.flows")


@task(name="train", cache_policy=NO_CACHE, **RETRIED)
def train(specification: str, on_points: Callable[[list[Point]], None]) -> str:
    """Activation dataset -> SAE artifact; the checksum of its weights."""
    run = Specification.from_json(specification)
    with turn(run.config.execution.training_limit), training_progress(steps.training_tokens(run)) as show:

        def both(points: list[Point]) -> None:
            on_points(points)
            show(points)

        return str(steps.launch_training(run, both).weights_sha256)


@contextmanager
def turn(limit: str | None) -> Iterator[None]:
    """Wait for a place under Prefect's global concurrency limit of that name."""
    if limit is None:
        yield
        return
    place = _acquired(limit)
    try:
        yield
    finally:
        try:
            place.__exit__(None, None, None)
        except TransportError as error:
            logger.warning("train: the place under '%s' could not be given back (%s); it ends by itself", limit, error)


def require_training_limit(limit: str | None) -> None:
    """That the server has the limit that a training waits for: found missing now, and not after an extraction of hours."""
    if limit is None:
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound as error:
            raise UserError(
                f"execution.training_limit: Prefect's server has no global concurrency limit '{limit}'; make it with "
                f"`prefect gcl create {limit} --limit 1`"
            ) from error


@retry(
    retry=retry_if_exception(lambda error: isinstance(error.__cause__, TransportError)),
    wait=wait_random_exponential(multiplier=1, max=20),
    stop=stop_after_delay(SERVER_PATIENCE_SECONDS),
    reraise=True,
)
def _acquired(limit: str) -> AbstractContextManager[None]:
    """A place, entered. Prefect's client is patient with a server that goes away, and not with one that is away when it starts,
    as it does for each place."""
    # A limit that does not exist would otherwise be no limit; a server that is away for a while must end no training.
    place = concurrency(limit, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
    place.__enter__()
    return place


@flow(name="train", flow_run_name="{config.title}")
def train_sae(config: RunConfig) -> dict[str, Any]:
    """Activation dataset -> SAE artifact, in the MLflow run that `pipeline` would go on with."""
    run = begin_with(config)
    require_training_limit(run.config.execution.training_limit)
    with steps.tracked(run, lineage_tags()) as open_run:
        weights = train(run.to_json(), open_run.add_points)
    return {"mlflow_run": open_run.run_id, "sae": run.sae_url, "weights_sha256": weights}
