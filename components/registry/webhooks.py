"""Webhooks of the MLflow server: it posts to an address of yours when an alias moves, signed with your secret."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient
from mlflow.entities.webhook import Webhook
from mlflow.exceptions import MlflowException

from components.redaction import redacted
from components.settings import UserError
from components.tracking.store import is_server

EVENTS = ("model_version_alias.created", "model_version.created")


def add_webhook(client: MlflowClient, name: str, url: str, secret: str | None, test: bool = False) -> dict[str, Any]:
    """Make the server call `url` whenever an alias is set (a promotion is one) or a version is made.

    One of the same name is replaced. test: also make the server call it now, with an invented version and alias.
    """
    _require_server(client)
    if not url.startswith("https://"):
        raise UserError(f"URL: '{url}' is not an address that MLflow calls; it starts with https://")
    earlier = [webhook for webhook in all_webhooks(client) if webhook.name == name]
    try:
        made = client.create_webhook(name, url, list(EVENTS), "registered by `sae models webhook`", secret)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise UserError(f"URL: the MLflow server refuses the webhook '{url}': {error.message}") from error
    # Not updated in place: an update cannot take a secret away. The new one is there before the old ones go.
    for webhook in earlier:
        client.delete_webhook(webhook.webhook_id)
    outcome = {**_described(made), "signed": secret is not None, "replaced": len(earlier)}
    return {**outcome, "test": _tested(client, made)} if test else outcome


def list_webhooks(client: MlflowClient) -> list[dict[str, Any]]:
    """Every webhook of the server, whoever made it; their secrets are not to be had."""
    _require_server(client)
    return [_described(webhook) | {"status": str(webhook.status)} for webhook in all_webhooks(client)]


def remove_webhook(client: MlflowClient, name: str) -> int:
    """Remove the webhooks of that name; how many there were."""
    _require_server(client)
    found = [webhook for webhook in all_webhooks(client) if webhook.name == name]
    if not found:
        raise UserError(f"--remove: there is no webhook '{name}' on this server; `sae models webhooks` lists them")
    for webhook in found:
        client.delete_webhook(webhook.webhook_id)
    return len(found)


def all_webhooks(client: MlflowClient) -> list[Webhook]:
    found: list[Webhook] = []
    token = None
    while True:
        page = client.list_webhooks(page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _require_server(client: MlflowClient) -> None:
    # A database takes the webhook too, and nobody would ever call it.
    if not is_server(client.tracking_uri):
        uri = redacted(client.tracking_uri)
        raise UserError(f"--uri: {uri} is a database, and webhooks are called by an MLflow server; give its http address")


def _described(webhook: Webhook) -> dict[str, Any]:
    events = sorted(str(event) for event in webhook.events)
    return {"id": webhook.webhook_id, "name": webhook.name, "url": webhook.url, "events": events}


def _tested(client: MlflowClient, webhook: Webhook) -> dict[str, Any]:
    result = client.test_webhook(webhook.webhook_id, EVENTS[0])
    return {"delivered": result.success, "status": result.response_status, "error": result.error_message}
