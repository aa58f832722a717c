"""The history of a registered model's champions, as a list that can only grow, one entry at a time.

MLflow sets an alias for whoever comes last. What it does offer is a run's parameter, which a database key keeps from
ever being changed: of two writers of `promotion.00007` one succeeds. So the list of promotions is the parameters of one
run per registered model (its id is in the model's tag `sae.ledger`, set as the model is created), the last entry names
the champion, and the alias `champion` follows it. Whoever loses the race for a number reads again and decides again.
"""

from __future__ import annotations

import getpass
import json
import logging
import platform
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

from components.settings import UserError
from components.tracking.liveness import close_dead_runs, ownership_tags
from components.tracking.store import ensure_experiment

CHAMPION = "champion"
LEDGER_TAG, SETTLED_TAG = "sae.ledger", "sae.alias_settled"
_PREFIX = "promotion."
_REASON_LENGTH = 2000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One change of the champion."""

    number: int
    version: str | None
    """The champion from here on; None where somebody took the alias away by hand."""
    action: str
    """`promote`, `force`, `rollback`, or `by hand` for an alias that was found moved."""
    parent: int
    """The entry whose champion a rollback restores; 0 where there is none."""
    reason: str
    at: str
    by: str
    token: str
    """Tells a writer its own entry from an equal one."""


def ensure_model(client: MlflowClient, name: str, experiment: str, tags: dict[str, str]) -> None:
    """The registered model, with its ledger, whoever makes it first.

    experiment: of the runs; the ledgers are in one beside it, so that they are not among what people compare.
    """
    found = _registered(client, name)
    if found is not None and LEDGER_TAG in found.tags:
        return
    experiment_id = ensure_experiment(client, f"{experiment}-promotions")
    close_dead_runs(client, experiment_id)  # of calls that were killed right here
    if found is None:
        ledger = _new_ledger(client, name, experiment_id)
        try:
            client.create_registered_model(name, tags={**tags, LEDGER_TAG: ledger})
            return
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            client.delete_run(ledger)  # another one was first, and its ledger counts
            found = _registered(client, name)
            assert found is not None
    if LEDGER_TAG not in found.tags:
        # A model that was made by other means: the tag is not exclusive, so look again once every rival has written.
        client.set_registered_model_tag(name, LEDGER_TAG, _new_ledger(client, name, experiment_id))
        time.sleep(1.0)


def _registered(client: MlflowClient, name: str) -> Any | None:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _new_ledger(client: MlflowClient, name: str, experiment_id: str) -> str:
    tags = {"sae.ledger_of": name, MLFLOW_RUN_NAME: f"promotions of {name}", **ownership_tags()}
    run = client.create_run(experiment_id, tags=tags)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


class Ledger:
    """The promotions of one registered model."""

    def __init__(self, client: MlflowClient, name: str) -> None:
        found = _registered(client, name)
        if found is None:
            raise UserError(f"NAME: there is no registered model '{name}' in this store; `sae models list` names them")
        if LEDGER_TAG not in found.tags:
            raise UserError(f"NAME: the registered model '{name}' was not made by `sae`, which cannot promote its versions")
        self.client, self.name, self.run_id = client, name, found.tags[LEDGER_TAG]

    def entries(self) -> list[Entry]:
        parameters = self.client.get_run(self.run_id).data.params
        kept = {key: value for key, value in parameters.items() if key.startswith(_PREFIX)}
        return [Entry(number=int(key.removeprefix(_PREFIX)), **json.loads(kept[key])) for key in sorted(kept)]

    def append(self, after: list[Entry], version: str | None, action: str, parent: int, reason: str) -> Entry | None:
        """The entry that follows `after`; None where somebody else has written that one."""
        entry = Entry(
            number=len(after) + 1, version=version, action=action, parent=parent, reason=reason[:_REASON_LENGTH],
            at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", by=f"{_user()}@{platform.node()}", token=uuid.uuid4().hex,
        )  # fmt: skip
        key = f"{_PREFIX}{entry.number:05d}"
        value = json.dumps({name: field for name, field in asdict(entry).items() if name != "number"})
        try:
            self.client.log_param(self.run_id, key, value)
        except MlflowException as error:
            stored = self.client.get_run(self.run_id).data.params.get(key)
            if stored is None:
                raise
            if stored != value:
                return None
            logger.debug("the entry was written, and its answer was lost: %s", error)
        return entry

    def settle(self) -> str | None:
        """Make the alias follow the last entry; the champion's version.

        A slow writer may set the alias late, to an older champion; it looks again after every write, and puts it right.
        """
        for _ in range(50):
            entries = self.entries()
            if not entries:
                return None
            head = entries[-1]
            if champion_version(self.client, self.name) == head.version:
                self.client.set_registered_model_tag(self.name, SETTLED_TAG, str(head.number))
                return head.version
            try:
                if head.version is None:
                    self.client.delete_registered_model_alias(self.name, CHAMPION)
                else:
                    self.client.set_registered_model_alias(self.name, CHAMPION, head.version)
            except MlflowException as error:  # two writers at the same moment: one is told so by the database
                logger.debug("setting the alias once more: %s", error)
                time.sleep(0.05)
        raise RuntimeError(f"{self.name}: the alias '{CHAMPION}' did not follow entry {head.number} of its history")

    def adopt_changes_by_hand(self) -> list[Entry]:
        """The entries; where somebody moved the alias in the UI, that is one of them."""
        entries = self.entries()
        moved = self._moved_to(entries)
        if moved is None:
            return entries
        time.sleep(1.0)  # a promotion that is just ending looks the same for a moment
        entries = self.entries()
        if self._moved_to(entries) != moved:
            return entries
        (version,) = moved
        self.append(entries, version, "by hand", entries[-1].number if entries else 0, "the alias was found moved")
        return self.entries()

    def _moved_to(self, entries: list[Entry]) -> tuple[str | None] | None:
        """Where the alias was moved by hand (version or None, in a tuple), None where it was not."""
        current = champion_version(self.client, self.name)
        head = entries[-1] if entries else None
        if current == (head.version if head else None):
            return None
        registered = _registered(self.client, self.name)
        settled = int((registered.tags if registered else {}).get(SETTLED_TAG, "0"))
        # A promotion that was killed before its alias was set has not been settled: `settle` ends it.
        return (current,) if head is None or settled >= head.number else None


def champion_version(client: MlflowClient, name: str) -> str | None:
    """The version that the alias names now."""
    aliases = client.get_registered_model(name).aliases
    return str(aliases[CHAMPION]) if CHAMPION in aliases else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
