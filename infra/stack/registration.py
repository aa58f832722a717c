"""What the Prefect server must know: pools, the limit on trainings, deployments, automations. Each is made or brought up to
date, so that doing it again changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type
from pydantic import SecretStr

from infra.stack.settings import AT_ONCE, LIMIT, POOLS, REPOSITORY

AUTOMATIONS = REPOSITORY / "infra" / "automations"
NOTIFY_VARIABLE = "SAE_NOTIFY_URL"
NOTIFICATIONS = "sae-notifications"
"""Name of the block that notifications go through."""

Say = Callable[[str], None]


def register(gpus: int | None, at_once: int | None, say: Say) -> None:
    """Everything, with the server that PREFECT_API_URL names. gpus: how many trainings run at the same time, at first 1;
    at_once: how many flow runs a pool of processes has at the same time, at first 2. None: as many as before."""
    with get_client(sync_client=True) as client:
        pools(client, at_once, say)
        limit(client, gpus, say)
        deployments(say)
        notifications(say)
        automations(client, say)


def pools(client: SyncPrefectClient, at_once: int | None, say: Say) -> None:
    """Process work pools; of a pool that is there nothing changes but the limit, and that of a pool of another type never.

    The limit is the pool's and not `prefect worker start --limit`: a worker that has one dies when a run that it still holds is
    scheduled again (the limiter's "this borrower is already holding one of this CapacityLimiter's tokens"), and takes
    its other runs down with it.
    """
    for name in POOLS:
        try:
            known = client.read_work_pool(name)
        except ObjectNotFound:
            template = run_coro_as_sync(get_default_base_job_template_for_infrastructure_type("process"))
            client.create_work_pool(
                WorkPoolCreate(
                    name=name, type="process", base_job_template=template or {}, concurrency_limit=at_once or AT_ONCE
                )
            )
            say(f"work pool {name}: {at_once or AT_ONCE} flow runs at a time")
            continue
        wanted = at_once or known.concurrency_limit or AT_ONCE
        if known.type == "process" and wanted != known.concurrency_limit:
            client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=wanted))
            say(f"work pool {name}: {wanted} flow runs at a time, not {known.concurrency_limit or 'any number'}")


def limit(client: SyncPrefectClient, gpus: int | None, say: Say) -> None:
    """The global concurrency limit."""
    try:
        known = client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=gpus or 1))
        say(f"global concurrency limit {LIMIT}: {gpus or 1} at a time")
        return
    if gpus is not None and known.limit != gpus:
        client.update_global_concurrency_limit(LIMIT, GlobalConcurrencyLimitUpdate(limit=gpus))
        say(f"global concurrency limit {LIMIT}: {gpus} at a time, not {known.limit}")


def deployments(say: Say) -> None:
    """Those of `prefect.yaml`, by Prefect's own command."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`prefect deploy --all` failed: {(done.stdout + done.stderr).strip()[-2000:]}")
    names = [deployment["name"] for deployment in yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]]
    say(f"deployments {', '.join(names)}")


def notifications(say: Say) -> None:
    """The block that failures and promotions are told through, where the environment says to whom."""
    url = os.environ.get(NOTIFY_VARIABLE)
    if not url:
        return
    # Slack, Mattermost, Teams and most others take a JSON object with `text`.
    block = CustomWebhookNotificationBlock(
        name=NOTIFICATIONS, url="{{url}}", secrets={"url": SecretStr(url)}, json_data={"text": "{{subject}}\n{{body}}"}
    )
    block.save(NOTIFICATIONS, overwrite=True)
    say(f"notifications to the address in {NOTIFY_VARIABLE}")


def automations(client: SyncPrefectClient, say: Say) -> None:
    """Those of `infra/automations`: made, or changed to what the file says. One that needs a notification block is left out
    while there is none."""
    present = {found.name: found.id for found in client.read_automations()}
    made = []
    for path in sorted(AUTOMATIONS.glob("*.yaml")):
        try:
            wanted = load_automation(
                path, lambda name: client.read_deployment_by_name(name).id, partial(_notification_block, client)
            )
        except MissingBlock:
            say(f"automation {path.stem}: left out, as {NOTIFY_VARIABLE} is not set")
            continue
        if wanted.name in present:
            client.update_automation(present[wanted.name], wanted)
        else:
            client.create_automation(wanted)
        made.append(wanted.name)
    say(f"automations {', '.join(made)}")


class MissingBlock(Exception):
    """There is nowhere to send notifications to."""


def load_automation(path: Path, deployment_id: Callable[[str], UUID], block_id: Callable[[], UUID]) -> AutomationCore:
    """An automation from its file. A file names deployments (`deployment: extract/cpu`) where Prefect wants their ids, and
    `block: notifications` for ours."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for action in tree["actions"]:
        if "deployment" in action:
            action |= {"source": "selected", "deployment_id": str(deployment_id(action.pop("deployment")))}
        if action.pop("block", None) is not None:
            action["block_document_id"] = str(block_id())
    return AutomationCore.model_validate(tree)


def _notification_block(client: SyncPrefectClient) -> UUID:
    try:
        return client.read_block_document_by_name(NOTIFICATIONS, "custom-webhook").id
    except ObjectNotFound:
        raise MissingBlock from None
