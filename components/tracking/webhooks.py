"""Webhooks of the MLflow server: it posts to an address of yours when an alias moves, signed with your secret."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.settings import UserError

EVENTS = ("model_version_alias.created", "model_version.created")


def add_webhook(client: MlflowClient, name: str, url: str, secret: str | None) -> dict[str, Any]:
    """Make the server call `url` whenever an alias is set (a promotion is one) or a version is made."""
    if not url.startswith("https://"):
        raise UserError(f"URL: '{url}' is not an address that MLflow calls; it starts with https://")
    try:
        made = client.create_webhook(name, url, list(EVENTS), "registered by `sae models webhook`", secret)
    except MlflowException as error:
        raise UserError(f"URL: the MLflow server refuses the webhook '{url}': {error.message}") from error
    return {"id": made.webhook_id, "name": made.name, "url": made.url, "events": list(EVENTS), "signed": secret is not None}
