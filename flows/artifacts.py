"""What a flow run's page shows: where the run is in MLflow, and how the SAE stands against its champion."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from components import steps
from components.registry.records import Outcome
from components.run.specification import Specification
from components.sweeps.record import SweepRecord

# Under `components`, whose logs the flow run's page shows.
logger = logging.getLogger("components.flows")


@contextmanager
def _for_show() -> Iterator[None]:
    """What people look at must not fail what has been done."""
    try:
        yield
    except Exception as error:
        logger.warning("the flow run's page lacks an artifact: %s: %s", type(error).__name__, error)


@_for_show()
def mlflow_run(run: Specification, run_id: str, address: str | None) -> None:
    """The MLflow run: a link where there is a server, its name where there is a database. MLflow's run names the flow run
    in turn."""
    rows = {"MLflow run": run_id, "activation dataset": run.dataset_digest, "SAE": run.sae_digest}
    text = "\n".join(f"- {name}: `{value}`" for name, value in rows.items())
    if address is None:
        create_markdown_artifact(text, key="mlflow-run")
    else:
        create_link_artifact(address, link_text=f"MLflow run {run_id}", key="mlflow-run", description=text)


@_for_show()
def features(run: Specification) -> None:
    """Where the feature browser is, and its map as a picture that needs no server."""
    if run.config.interpretation.tokens == 0:
        return
    address = steps.browser_address(run)
    link = address if "://" in address else Path(address).absolute().as_uri()
    told = f"`{address}`, and `sae/browser/index.html` among the artifacts of the MLflow run"
    create_link_artifact(link, link_text=f"Features of {run.config.title}", key="feature-browser", description=told)
    if (figure := steps.feature_map(run)) is not None:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=80)
        data = base64.b64encode(picture.getvalue()).decode()
        create_image_artifact(
            f"data:image/png;base64,{data}", key="feature-map", description="Features that lie near one another"
        )


@_for_show()
def verdict(run: Specification, outcome: Outcome) -> None:
    """The version and its alias; its metrics beside those of the champion that it was measured against; the gates."""
    rows = {
        "model version": outcome.uri,
        "MLflow run": outcome.mlflow_run,
        "alias": f"{outcome.alias}: {outcome.alias_reason}",
    }
    create_markdown_artifact("\n".join(f"- {name}: `{value}`" for name, value in rows.items()), key="model-version")
    compared = steps.comparison(run, outcome)
    against = "there was no champion" if compared["champion"] is None else f"against version {compared['champion']}"
    name = f"{outcome.registered_model} version {outcome.model_version}"
    create_table_artifact(compared["metrics"], key="metrics", description=f"{name}, {against}")
    create_table_artifact(compared["gates"], key="gates", description=f"{name}: {outcome.alias_reason}")


@_for_show()
def sweep_points(record: SweepRecord) -> None:
    """Every child with its setting and what it came to."""
    shown = ("loss", "l0", "explained_variance", "loss_recovered", "flops_dense", "reason")
    rows = [{**point.values, "status": point.status, **point.model_dump(include=set(shown))} for point in record.points]
    create_table_artifact(rows, key="sweep", description=f"sweep of {record.name}, MLflow run {record.mlflow_run}")
