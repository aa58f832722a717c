"""Where runs are tracked and SAEs are registered."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from components.bounds import LONGEST_SECONDS
from components.redaction import holds_password, redacted
from components.settings import Settings
from components.storage.addresses import LocalPath

FLOW_RUN_TAG = "prefect.flow_run_id"
"""Tag of an MLflow run: the flow run that writes it."""
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


class TrackingSettings(Settings):
    uri: str | None = None
    """MLflow server or database; the environment's MLFLOW_TRACKING_URI, or else `mlflow.db` under the storage root."""

    experiment: str = Field(default="sae-foundry", min_length=1, max_length=250)
    """MLflow experiment of the runs."""

    registered_model: str | None = Field(default=None, pattern=r"^[^/:]+$")
    """Name in the model registry, without slash or colon; `<language model>.<hook point>` where it is not given."""

    purpose: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """What the SAE is for, where one language model and hook point have several: the last part of the registered name."""

    gates: LocalPath | None = None
    """YAML file with the gates that a version must pass to become champion; `mlflow/gates.yaml` where it is not given."""

    patience_seconds: float = Field(default=600.0, gt=0, le=LONGEST_SECONDS)
    """How long a finished step waits for an MLflow server that does not answer, before the run fails."""

    system_metrics_seconds: float = Field(default=5.0, gt=0, le=LONGEST_SECONDS)
    """Seconds between two samples of CPU, memory, disk and GPU use."""

    @field_validator("uri")
    @classmethod
    def _is_an_address_without_a_password(cls, uri: str | None) -> str | None:
        # The configuration is stored with every run and artifact.
        if uri is not None and holds_password(uri):
            raise ValueError("tracking.uri holds a password; leave it out and set MLFLOW_TRACKING_URI or _PASSWORD instead")
        problem = None if uri is None else uri_problem(uri)
        if problem is not None:
            raise ValueError(f"tracking.uri: {problem}")
        return uri


def uri_problem(uri: str) -> str | None:
    """Why an address is none of an MLflow server or database, None where it is one."""
    accepted = f"'{redacted(uri)}' is not an MLflow address; it starts with one of {', '.join(_SCHEMES)}"
    try:
        parts = urlsplit(uri)
        scheme, whole = parts.scheme.partition("+")[0], bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        return f"'{redacted(uri)}' is not an MLflow address: {error}"
    if scheme not in _SCHEMES:
        return accepted
    if scheme in ("http", "https") and not whole:
        return f"'{redacted(uri)}' names no server; accepted is http://HOST:PORT"
    if scheme == "sqlite" and re.fullmatch(r"[a-z+]+:///[^?#]+", uri) is None:
        return f"'{redacted(uri)}' names no file; accepted is sqlite:///PATH, without '?' and '#' in it"
    return None
