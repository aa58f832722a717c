"""What is recorded of a registration."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from components.settings import Record


class Outcome(Record):
    """What a registration came to."""

    mlflow_run: str
    registered_model: str
    model_version: int
    alias: str | None
    alias_reason: str

    @property
    def uri(self) -> str:
        return f"models:/{self.registered_model}/{self.model_version}"


class Imported(Record):
    """Of an SAE that was made elsewhere."""

    address: str
    format: str
    content_sha256: str


class StartedFrom(Record):
    """The coder that a training continued from."""

    location: str
    weights_sha256: str
    config_sha256: str


class Lineage(Record):
    """`lineage.json`, beside the weights in every registered version."""

    mlflow_run: str
    prefect_flow_run: str | None = None
    imported: Imported | None = None
    """None of one of ours, which has the three digests."""
    sae_digest: str | None = None
    weights_sha256: str
    dataset_digest: str | None = None
    dataset_url: str | None = None
    start: StartedFrom | None = None
    """None where training began with new weights."""
    token_digest: str
    token_url: str
    code: dict[str, str] = Field(default_factory=dict)
    """Commit, as tags of the run."""
    configuration: dict[str, Any]

    def reproduction(self) -> dict[str, Any]:
        """The configuration that makes the version again: as it was, without where it was stored and tracked and what
        ran it."""
        tree = json.loads(json.dumps(self.configuration))
        tree.pop("storage", None)
        tree.pop("execution", None)  # of the machines that it ran on
        # What it was started from, and not whoever is champion when it is made again.
        tree["training"]["start_from"] = None if self.start is None else self.start.location
        tracking = tree.pop("tracking", {})
        kept = {key: tracking[key] for key in ("registered_model", "purpose") if tracking.get(key)}
        return {**tree, "storage": {"root": "reproduction"}, **({"tracking": kept} if kept else {})}
