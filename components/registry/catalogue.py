"""What `sae models` shows of the registry, as plain JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from components.registry.gates import Gates, check_gates
from components.registry.history import CHAMPION, LEDGER_TAG, Ledger
from components.registry.versions import (
    DATASET_TAG,
    GATES_TAG,
    REASON_TAG,
    SET_TAG,
    WEIGHTS_TAG,
    lineage_of,
    recorded_metrics,
    recorded_stability,
    reproduction_commands,
    resolve_version,
    search_versions,
    version_or_none,
)
from components.settings import UserError
from components.tracking.code import GIT_COMMIT_TAG, git_tags

COMPARED = (
    "loss_recovered", "l0", "explained_variance", "dead_fraction", "ce_loss_clean", "ce_loss_sae", "kl_divergence", "mse",
    "cosine_similarity", "norm_ratio", "evaluation_tokens",
)  # fmt: skip
SHOWN = ("loss_recovered", "l0", "explained_variance", "dead_fraction", "evaluation_tokens")


def list_models(client: MlflowClient, name: str | None = None) -> list[dict[str, Any]]:
    """Each registered model of ours with its versions, newest first; all of them, or the one of that name."""
    models = []
    token = None
    while True:
        page = client.search_registered_models(max_results=200, page_token=token)
        models += [model for model in page if LEDGER_TAG in model.tags and (name is None or model.name == name)]
        token = page.token
        if not token:
            break
    if name is not None and not models:
        raise UserError(f"NAME: there is no registered model '{name}' in this store")
    listed = []
    for model in models:
        aliases = _by_version(model.aliases)
        versions = search_versions(client, f"name = '{model.name}'")
        rows = [_row(version, aliases.get(str(version.version), [])) for version in reversed(versions)]
        champion = str(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
        listed.append({"name": model.name, "champion": champion, "versions": rows})
    return listed


def _by_version(aliases: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for alias, version in aliases.items():
        found.setdefault(str(version), []).append(alias)
    return found


def _row(version: ModelVersion, aliases: list[str]) -> dict[str, Any]:
    metrics = recorded_metrics(version)
    made = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    return {
        "version": int(version.version),
        "aliases": sorted(aliases),
        "created": f"{made:%Y-%m-%dT%H:%M:%SZ}",
        **{key: metrics.get(key) for key in SHOWN},
        "reason": version.tags.get(REASON_TAG),
    }


def show(client: MlflowClient, reference: str) -> dict[str, Any]:
    """Everything that is recorded of one version: metrics, gates, lineage, history, and how to make it again."""
    version = resolve_version(client, reference)
    tags, name = version.tags, f"{version.name}/{version.version}"
    lineage = lineage_of(client, version)
    commit = tags.get(GIT_COMMIT_TAG)
    here = git_tags().get(GIT_COMMIT_TAG)
    history = [entry for entry in Ledger(client, version.name).entries() if entry.version == str(version.version)]
    command = reproduction_commands(name, lineage.imported)
    if commit and commit != here:
        command.insert(0, f"git checkout {commit}")
    return {
        "name": version.name,
        "version": int(version.version),
        "aliases": sorted(version.aliases),
        "uri": f"models:/{name}",
        "metrics": recorded_metrics(version),
        "stability": recorded_stability(version),
        "gates": json.loads(tags[GATES_TAG]) if GATES_TAG in tags else None,
        "history": [{"action": entry.action, "at": entry.at, "by": entry.by, "reason": entry.reason} for entry in history],
        "rolled_back": tags.get("sae.rolled_back"),
        "lineage": {
            "mlflow_run": version.run_id,
            "prefect_flow_run": lineage.prefect_flow_run,
            "git_commit": commit,
            "git_dirty": tags.get("sae.git_dirty"),
            "dataset_digest": tags.get(DATASET_TAG),
            "dataset_url": lineage.dataset_url,
            "token_digest": lineage.token_digest,
            "weights_sha256": tags.get(WEIGHTS_TAG),
            "started_from": lineage.start.location if lineage.start else None,
        },
        "reproduce": command,
    }


def against_champion(client: MlflowClient, name: str, version: str) -> dict[str, Any]:
    """A version beside the champion that its gates compared it with: rows of two tables, for people."""
    found = client.get_model_version(name, version)
    report = json.loads(found.tags.get(GATES_TAG, '{"gates": [], "champion": null}'))
    before = None if report["champion"] is None else version_or_none(client, name, str(report["champion"]))
    here, there = recorded_metrics(found), recorded_metrics(before) if before else {}
    shown = [metric for metric in COMPARED if metric in here or metric in there]
    return {
        "champion": report["champion"],
        "metrics": [
            {
                "metric": metric,
                "this version": here.get(metric),
                "champion": there.get(metric),
                "change": here[metric] - there[metric] if metric in here and metric in there else None,
            }
            for metric in shown
        ],
        "gates": [
            {
                "gate": row["gate"],
                "verdict": "pass" if row["passed"] else "fail",
                "measured": row["measured"],
                "required": row["required"],
                "short by": row["short_by"],
            }
            for row in report["gates"]
        ],
    }


def compare(client: MlflowClient, references: list[str], gates: Gates) -> dict[str, Any]:
    """Metrics side by side; with two or more, the gates that each later one would face with the first as champion."""
    versions = [resolve_version(client, reference) for reference in references]
    metrics = [recorded_metrics(version) for version in versions]
    first = versions[0]
    names = [f"{version.name}/{version.version}" for version in versions]
    sets = {version.tags.get(SET_TAG) for version in versions}
    every = list(dict.fromkeys(name for row in metrics for name in row))
    reports = {
        label: check_gates(
            gates, row, version.tags.get(SET_TAG, "?"), metrics[0], first.tags.get(SET_TAG, "??"), str(first.version)
        ).as_json()
        for label, row, version in list(zip(names, metrics, versions, strict=True))[1:]
    }
    return {
        "versions": names,
        "same_evaluation_set": len(sets) == 1,
        "metrics": {name: [row.get(name) for row in metrics] for name in every},
        "stability": [recorded_stability(version) for version in versions],
        "against_first": reports,
    }
