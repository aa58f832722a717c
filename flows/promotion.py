"""A promotion as a Prefect event, so that automations can start what follows it."""

from __future__ import annotations

from typing import Any

from prefect.events import emit_event

from components import steps
from components.run.specification import Specification

PROMOTED = "sae.champion.promoted"


def announce(run: Specification, summary: dict[str, Any]) -> None:
    """The event `sae.champion.promoted`, once for each version that became champion; its payload is what a deployment needs."""
    if not steps.is_news(run, summary):
        return
    name, version = summary["registered_model"], summary["model_version"]
    resource = {
        "prefect.resource.id": f"sae.registered-model.{name}",
        "prefect.resource.name": name,
        "sae.version": str(version),
    }
    payload = {
        "registered_model": name,
        "version": version,
        "model_uri": f"models:/{name}/{version}",
        "reason": summary["alias_reason"],
        # Without what belongs to the machine: the worker's own defaults apply.
        "config": run.config.model_dump(mode="json", exclude={"execution", "storage"}),
    }
    emit_event(PROMOTED, resource=resource, payload=payload)
