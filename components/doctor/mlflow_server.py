"""Whether the MLflow store of a configuration is there, is the right version, and takes what a run writes."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from packaging.version import InvalidVersion, Version

from components import storage
from components.doctor.check import REQUEST_SECONDS, Answer, Check, clock_check, explained, timed
from components.redaction import redacted
from components.settings import UserError
from components.tracking.settings import TrackingSettings
from components.tracking.store import database_exists, is_server, quiet_mlflow, tracking_uri

_SECTION = "MLflow"
_TAG = "sae.doctor"
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def mlflow_checks(settings: TrackingSettings, root: str, shared: bool = False) -> Iterator[Check]:
    """Store, API, version, write access and artifacts. A tag and a small artifact are written and removed again.

    shared: several machines or many runs at once will use the store.
    """
    quiet_mlflow()
    try:
        uri = tracking_uri(settings, root)
    except UserError as error:
        advice = "Set tracking.uri or MLFLOW_TRACKING_URI to an MLflow server: a bucket cannot hold its database."
        yield Check(_SECTION, "store", "failure", str(error), advice)
        return
    origin = (
        "tracking.uri" if settings.uri else "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "storage.root"
    )
    yield Check(_SECTION, "store", "ok", f"{redacted(uri)}, from {origin}")
    with _impatient():
        server = is_server(uri)
        reached = yield from (_server(uri, settings.experiment) if server else _database(uri, settings, root, shared))
        if reached:
            yield from _writes(uri, settings.experiment)


@contextmanager
def _impatient() -> Iterator[None]:
    """MLflow's own requests, which otherwise go on for minutes, are made once and with a short limit."""
    short = {"MLFLOW_HTTP_REQUEST_TIMEOUT": f"{REQUEST_SECONDS:.0f}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in short}
    os.environ.update(short)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _ask(uri: str, path: str, **parameters: str) -> Answer:
    """A GET with the credentials and certificates that MLflow's own client uses; an MlflowException where no answer comes."""
    host = get_default_host_creds(uri)
    options: dict[str, Any] = {"max_retries": 0, "timeout": REQUEST_SECONDS, "raise_on_status": False, "params": parameters}
    return timed(lambda: http_request(host, path, "GET", **options))


def _server(uri: str, experiment: str) -> Generator[Check, None, bool]:
    """True at the end where the API works."""
    shown, host = redacted(uri), urlsplit(uri).hostname
    try:
        health = _ask(uri, "/health")
    except Exception as error:
        advice = "Start the MLflow server, or correct its address (tracking.uri, MLFLOW_TRACKING_URI)."
        yield Check(_SECTION, "server", "failure", f"{shown} does not answer: {explained(error)}", advice)
        return False
    yield from clock_check("MLflow", health)
    if health.status != 200:
        advice = "See that this is the address of an MLflow server, with its prefix where it has one, and look at its log."
        yield Check(_SECTION, "server", "failure", f"{shown}/health answers {health.status}", advice)
        return False
    yield Check(_SECTION, "server", "ok", f"answers in {health.seconds * 1e3:.0f} ms")
    api = _ask(uri, "/api/2.0/mlflow/experiments/get-by-name", experiment_name=experiment)
    missing = api.status == 404 and b"RESOURCE_DOES_NOT_EXIST" in api.body
    if api.status != 200 and not missing:
        yield Check(_SECTION, "API", "failure", *_refusal(api, host))
        return False
    yield Check(_SECTION, "API", "ok", "takes requests")
    yield _version(_ask(uri, "/version"))
    return True


def _refusal(api: Answer, host: str | None) -> tuple[str, str]:
    found = f"answers {api.status}"
    if api.status == 401:
        given = os.environ.get("MLFLOW_TRACKING_USERNAME") and os.environ.get("MLFLOW_TRACKING_PASSWORD")
        what = "the user or the password is not known there" if given else "no user and password are given"
        advice = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user that the server knows."
        return f"{found}: {what}", advice
    if api.status == 403 and b"Host header" in api.body:
        return (
            f"{found}: the server does not take requests for the name '{host}', although /health works",
            f"Start the server with `--allowed-hosts` (MLFLOW_SERVER_ALLOWED_HOSTS) that has '{host}' in it, with its port.",
        )
    if api.status == 403:
        return f"{found}: not allowed", "Have the server's administrator give this user the right to read the experiment."
    return found, "See that this is the address of an MLflow server, with its prefix where it has one, and look at its log."


def _version(answer: Answer) -> Check:
    text, ours = answer.body.decode("utf-8", "replace").strip(), Version(mlflow.__version__)
    try:
        theirs = Version(text)
    except InvalidVersion:
        return Check(_SECTION, "version", "skipped", f"the server does not tell (status {answer.status})")
    if (theirs.major, theirs.minor) == (ours.major, ours.minor):
        return Check(_SECTION, "version", "ok", f"{theirs}, as here")
    found = f"the server is {theirs}, here is {ours}"
    advice = f"Install mlflow=={ours} on the server, and run `mlflow db upgrade` there where it was older."
    return Check(_SECTION, "version", "failure" if theirs.major != ours.major else "warning", found, advice)


def _database(uri: str, settings: TrackingSettings, root: str, shared: bool) -> Generator[Check, None, bool]:
    """True at the end where the database can be used."""
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    if kind == "sqlite" and shared:
        advice = "Start an MLflow server on PostgreSQL and set MLFLOW_TRACKING_URI: SQLite locks when several runs write."
        yield Check(_SECTION, "database", "warning", "SQLite, for runs on several workers", advice)
    if not database_exists(settings, root):
        yield Check(_SECTION, "write", "skipped", "there is no database yet; the first run makes it")
        return False
    try:
        if parts.hostname:
            with socket.create_connection((parts.hostname, parts.port or _PORTS.get(kind, 0)), timeout=REQUEST_SECONDS):
                pass
        _connect(uri, kind)
    except Exception as error:
        advice = "Start the database, or correct address, user and password (PGPASSWORD or ~/.pgpass) of the MLflow store."
        yield Check(_SECTION, "database", "failure", explained(error), advice)
        return False
    return True


def _connect(uri: str, kind: str) -> None:
    # MLflow itself would try for hours.
    import sqlalchemy

    arguments: dict[str, Any] = {"connect_timeout": int(REQUEST_SECONDS)} if kind in ("postgresql", "mysql") else {}
    engine = sqlalchemy.create_engine(uri, connect_args=arguments)
    try:
        with engine.connect():
            pass
    finally:
        engine.dispose()


def _writes(uri: str, name: str) -> Iterator[Check]:
    """A tag is the least that can be written: it goes again without a trace, where a run or an experiment would stay."""
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    advice = "Have the server's administrator give this user the right to edit the experiment, and look at the server's log."
    try:
        experiment = client.get_experiment_by_name(name) or client.get_experiment("0")
    except Exception as error:
        yield Check(_SECTION, "write", "failure", explained(error), advice)
        return
    key = f"{_TAG}.{uuid.uuid4().hex[:8]}"
    try:
        client.set_experiment_tag(experiment.experiment_id, key, "a probe")
        client.delete_experiment_tag(experiment.experiment_id, key)
    except Exception as error:
        refused = getattr(error, "error_code", None) == "PERMISSION_DENIED"
        if refused and experiment.name != name:  # who may make experiments need have no right to edit the server's own
            found = f"cannot be tried: there is no experiment '{name}' yet, and '{experiment.name}' is not this user's"
            yield Check(_SECTION, "write", "skipped", found)
        else:
            found = f"this user may not edit the experiment '{experiment.name}'" if refused else explained(error)
            yield Check(_SECTION, "write", "failure", found, advice)
        yield Check(_SECTION, "artifacts", "skipped", "without the right to write")
        return
    yield Check(_SECTION, "write", "ok", f"a tag of the experiment '{experiment.name}' was set and removed")
    yield _artifacts(uri, experiment.artifact_location)


def _artifacts(uri: str, location: str) -> Check:
    if is_server(uri) and not urlsplit(location).scheme.startswith("mlflow-artifacts") and storage.is_local(location):
        advice = (
            "Start the server with `--artifacts-destination` (as in mlflow/server.env) and take a new tracking.experiment: "
            "where an experiment keeps its artifacts is fixed when it is made."
        )
        return Check(_SECTION, "artifacts", "failure", f"the server has each client write them to its own {location}", advice)
    probe = f"sae-doctor-{uuid.uuid4().hex[:8]}.txt"
    advice = "Look at the log of the MLflow server: it has to reach its artifact store and to have the right to write there."
    if not is_server(uri) or not location.startswith("mlflow-artifacts:"):
        advice = f"Give this machine the right to write to {redacted(location)}: artifacts do not go through a server here."
    repository = get_artifact_repository(location, tracking_uri=uri, registry_uri=uri)
    try:
        with tempfile.TemporaryDirectory(prefix="sae-doctor-") as folder:
            path = Path(folder, probe)
            path.write_text("a probe of sae doctor, which may be deleted\n")
            started = time.monotonic()
            repository.log_artifact(str(path))
            taken = time.monotonic() - started
            there = any(entry.path == probe for entry in repository.list_artifacts())
    except Exception as error:
        return Check(_SECTION, "artifacts", "failure", f"{redacted(location)}: {explained(error)}", advice)
    finally:
        removed = _removed(repository, probe)
    if not there:
        return Check(_SECTION, "artifacts", "failure", f"{redacted(location)}: a file was taken and is not listed", advice)
    found = f"{redacted(location)}: a file was written in {taken * 1e3:.0f} ms"
    if not removed:
        return Check(_SECTION, "artifacts", "warning", f"{found}, and could not be removed", f"Delete {probe} there by hand.")
    return Check(_SECTION, "artifacts", "ok", f"{found} and removed")


def _removed(repository: Any, probe: str) -> bool:
    try:
        repository.delete_artifacts(probe)
    except Exception:
        return False
    return True
