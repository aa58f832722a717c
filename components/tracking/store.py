"""Which MLflow store a configuration means, and a client for it."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components import storage
from components.redaction import errors_redacted, redacted
from components.settings import UserError
from components.tracking.address import URI_VARIABLE, USER_VARIABLE, file_of, is_file, is_server, tracking_uri
from components.tracking.settings import TrackingSettings

__all__ = ["connect", "database_exists", "ensure_experiment", "is_server", "quiet_mlflow", "refusal_explained", "tracking_uri"]


def run_address(client: MlflowClient, experiment_id: str, run_id: str) -> str | None:
    """Where the UI of the client's server shows a run; None where it is a database without a server."""
    uri = client.tracking_uri
    return f"{redacted(uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if is_server(uri) else None


def connect(settings: TrackingSettings, root: str) -> MlflowClient:
    """Point MLflow at the configured store and make sure that the experiment is there."""
    quiet_mlflow()
    uri = tracking_uri(settings, root)
    before = {name: os.environ.get(name) for name in (URI_VARIABLE, "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    # MLflow writes the variables too; left there, they would decide the next run of this process with another root, and
    # where a program that it starts looks for models.
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    with errors_redacted(), refusal_explained(), _alone_with(uri):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)  # which makes the tables of a fresh database
        ensure_experiment(client, settings.experiment)
    return client


def _alone_with(uri: str) -> AbstractContextManager[None]:
    """Two processes must not make the tables of one database at the same time. A server makes its own."""
    if is_server(uri):
        return nullcontext()
    if is_file(uri):
        return storage.exclusive(str(file_of(uri).resolve()))
    name = sha256(uri.encode()).hexdigest()[:16]
    return storage.exclusive(str(Path(tempfile.gettempdir()) / f"sae-mlflow-{name}"))  # against those on this machine


@contextmanager
def refusal_explained() -> Iterator[None]:
    """A server that wants to know who asks, or does not allow it to them, as a UserError."""
    try:
        yield
    except MlflowException as error:
        server = redacted(mlflow.get_tracking_uri())
        if error.error_code == "UNAUTHENTICATED":
            raise UserError(
                f"tracking.uri: {server} wants a user and a password, or refuses those given; "
                "they come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        if error.error_code == "PERMISSION_DENIED":
            raise UserError(
                f"tracking.uri: {server} does not allow this to '{os.environ.get(USER_VARIABLE, 'you')}'; its "
                "administrator can (mlflow/README.md, 'Users'), or take an experiment and a registered model of your own"
            ) from error
        raise


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment of that name, made if it is not there."""
    found = client.get_experiment_by_name(name)
    if found is None:
        uri = client.tracking_uri
        # A database in a file keeps its artifacts beside it, not in the working directory.
        location = (file_of(uri).resolve().parent / "mlflow-artifacts").as_uri() if is_file(uri) else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:  # another run that starts at the same time was first
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment: '{name}' was deleted in MLflow, which keeps its name; restore it (`mlflow experiments "
            f"restore --experiment-id {found.experiment_id}`), or take another name"
        )
    return str(found.experiment_id)


def database_exists(settings: TrackingSettings, root: str) -> bool:
    """Whether there is a store to ask; a SQLite file that is not there yet would be created by asking."""
    uri = tracking_uri(settings, root)
    return not is_file(uri) or file_of(uri).is_file()


def quiet_mlflow() -> None:
    """Settings of the library that must stand before its first use; no telemetry, no copies of this repository."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # With a uv.lock in the working directory, log_model would copy lock and project into the model.
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.utils.environment", "mlflow.system_metrics", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The specified dataset source can be interpreted in multiple ways")
