"""A promotion as a Prefect event, so that automations can start what follows it."""

from __future__ import annotations

from prefect.events import emit_event

from components import steps
from components.registry.records import Outcome
from components.run.specification import Specification

PROMOTED = "sae.champion.promoted"


def announce(run: Specification, outcome: Outcome) -> None:
    """The event `sae.champion.promoted`, once for each version that became champion; its payload is what a deployment needs."""
    if not steps.is_news(run, outcome):
        return
    name, version = outcome.registered_model, outcome.model_version
    resource = {
        "prefect.resource.id": f"sae.registered-model.{name}",
        "prefect.resource.name": name,
        "sae.version": str(version),
    }
    payload = {
        "registered_model": name,
        "version": version,
        "model_uri": outcome.uri,
        "reason": outcome.alias_reason,
        # Without what belongs to the machine: the worker's own defaults apply.
        "config": run.config.model_dump(mode="json", exclude={"execution", "storage"}),
    }
    emit_event(PROMOTED, resource=resource, payload=payload)
