"""Where runs are tracked and SAEs are registered."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from components.bounds import LONGEST_SECONDS
from components.redaction import holds_password
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
        scheme = "" if uri is None else urlsplit(uri).scheme.partition("+")[0]
        if uri is not None and scheme not in _SCHEMES:
            raise ValueError(f"tracking.uri: '{uri}' is not an MLflow address; it starts with one of {', '.join(_SCHEMES)}")
        return uri
