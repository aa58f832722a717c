"""Promotion and rollback: gates, one entry in the ledger, one alias, and the reasons as tags and artifacts."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.redaction import redacted
from components.registry.gates import GateResult, Gates, check_gates, markdown_table
from components.registry.history import CHAMPION, Entry, Ledger
from components.registry.model_files import FILES_TAG, stored_difference
from components.registry.versions import (
    CHALLENGER,
    DECISION_TAG,
    GATES_TAG,
    PASSED_TAG,
    REASON_TAG,
    SET_TAG,
    WEIGHTS_TAG,
    recorded_metrics,
    stored_file,
    version_or_none,
)
from components.settings import UserError
from components.storage import file_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of a candidate."""

    alias: str
    """`champion`, or `challenger` for one that was refused."""
    reason: str
    report: dict[str, Any]
    """The table of gates."""
    entry: Entry | None = None
    """Its place in the ledger, where it was promoted."""


def promote(
    client: MlflowClient, name: str, version: str, gates: Gates, force: str | None = None, verified: GateResult | None = None
) -> Decision:
    """Make the version champion if it passes the gates, or, with the reason `force`, although it does not.

    verified: of files that have been compared already (see `check_files`); compared here where not given.
    Safe against others that do the same: whoever loses the race for the next entry is measured against the new champion.
    """
    ledger = Ledger(client, name)
    candidate = client.get_model_version(name, version)
    whole = verified or check_files(client, candidate)
    while True:
        entries = ledger.adopt_changes_by_hand()
        head = entries[-1] if entries else None
        if head is not None and head.version == version:
            ledger.settle()
            return _earlier_decision(client, name, version, head)
        champion = version_or_none(client, name, head.version) if head is not None and head.version else None
        report = check_gates(
            gates,
            recorded_metrics(candidate),
            candidate.tags.get(SET_TAG, "unknown"),
            recorded_metrics(champion) if champion else None,
            champion.tags.get(SET_TAG, "unknown") if champion else None,
            str(champion.version) if champion else None,
        )
        report = replace(report, results=(whole, *report.results))
        if not report.passed and (force is None or not whole.passed):
            decision = Decision(alias=CHALLENGER, reason=report.reason, report=report.as_json())
            _record(client, candidate, decision)
            return decision
        reason = report.reason if report.passed else f"forced: {force} (the gates: {report.reason})"
        decision = Decision(alias=CHAMPION, reason=reason, report={**report.as_json(), "forced": force})
        # Before the entry: a call that is killed here decides again, one that is killed later finds its reasons there.
        _record(client, candidate, decision)
        action = "promote" if report.passed else "force"
        entry = ledger.append(entries, version, action, head.number if head else 0, reason)
        if entry is not None:
            break
        logger.info("promote: another version became champion of %s meanwhile; deciding again", name)
    ledger.settle()
    _drop_challenger(client, name, version)
    _note(client, name, entry)
    logger.info("promote: %s version %s is champion: %s", name, version, decision.reason)
    return replace(decision, entry=entry)


def rollback(client: MlflowClient, name: str, reason: str) -> tuple[Entry, str]:
    """Make the champion before this one champion again; the new entry and the version that it replaces.

    Rolling back again goes further back, not forth. Versions that are gone or damaged are passed over.
    """
    ledger = Ledger(client, name)
    while True:
        entries = ledger.adopt_changes_by_hand()
        if not entries or entries[-1].version is None:
            raise UserError(f"NAME: '{name}' has no champion to roll back")
        head = entries[-1]
        earlier = head.parent
        while earlier:
            previous = entries[earlier - 1]
            found = version_or_none(client, name, previous.version) if previous.version else None
            if found is not None and check_files(client, found).passed:
                break
            earlier = previous.parent
        if not earlier:
            raise UserError(f"NAME: version {head.version} is the first champion of '{name}'; there is none to go back to")
        previous = entries[earlier - 1]
        entry = ledger.append(entries, previous.version, "rollback", previous.parent, reason)
        if entry is not None:
            break
    ledger.settle()
    _note(client, name, entry)
    assert head.version is not None
    if version_or_none(client, name, head.version) is not None:
        client.set_model_version_tag(name, head.version, "sae.rolled_back", f"{entry.at}: {reason}")
    return entry, head.version


def check_files(client: MlflowClient, version: ModelVersion) -> GateResult:
    """Whether the files behind the version are there and are those that were sent, code included; of a version from before
    their checksums were kept, the weights."""
    wanted = version.tags.get(FILES_TAG)
    try:
        if wanted is not None:
            return files_gate(wanted, stored_difference(client, f"models:/{version.name}/{version.version}", wanted))
        weights = version.tags.get(WEIGHTS_TAG, "")
        with tempfile.TemporaryDirectory(prefix="sae-check-") as scratch:
            found = file_sha256(stored_file(client, version, "sae_weights.safetensors", Path(scratch)))
        return files_gate(weights, None if found == weights else f"the weights are {found[:16]}")
    except (MlflowException, OSError, UserError) as error:
        return files_gate(wanted or "", redacted(f"{type(error).__name__}: {error}")[:200])


def files_gate(wanted: str, wrong: str | None) -> GateResult:
    """wanted: SHA-256 of what was sent. wrong: how the files differ from that."""
    required = f"the files that were sent, {wanted[:16] or 'with a recorded checksum'}"
    return GateResult(gate="files", passed=bool(wanted) and wrong is None, measured=wrong or wanted[:16], required=required)


def _earlier_decision(client: MlflowClient, name: str, version: str, head: Entry) -> Decision:
    tags = client.get_model_version(name, version).tags
    report = json.loads(tags.get(GATES_TAG, '{"gates": [], "passed": true}'))
    return Decision(alias=CHAMPION, reason=tags.get(REASON_TAG, head.reason), report=report, entry=head)


def _record(client: MlflowClient, version: ModelVersion, decision: Decision) -> None:
    """The decision and its table as tags of the version and as artifacts of its run."""
    name, number = version.name, str(version.version)
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"[:-3] + "Z"
    about = {"model": name, "version": number, "alias": decision.alias, "at": stamp}
    document = {**about, **decision.report, "reason": decision.reason}
    path = f"gates/{name}-v{number}-{stamp}"
    if version.run_id:
        title = "champion" if decision.alias == CHAMPION else "refused"
        client.log_dict(version.run_id, document, f"{path}.json")
        text = f"# {name} version {number}: {title}\n\n{decision.reason}\n\n{markdown_table(decision.report)}"
        client.log_text(version.run_id, text, f"{path}.md")
    for key, value in {
        REASON_TAG: decision.reason,
        GATES_TAG: json.dumps(document),
        PASSED_TAG: str(decision.report["passed"]).lower(),
        DECISION_TAG: decision.alias,
    }.items():
        client.set_model_version_tag(name, number, key, value)


def _drop_challenger(client: MlflowClient, name: str, version: str) -> None:
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


def _note(client: MlflowClient, name: str, entry: Entry) -> None:
    """The entry as a tag of the registered model, where the MLflow UI shows it."""
    text = f"version {entry.version}, {entry.action} by {entry.by} at {entry.at}: {entry.reason}"
    client.set_registered_model_tag(name, f"sae.promotion.{entry.number:05d}", text)
