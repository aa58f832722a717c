"""The model registry, read: versions, what is recorded of them, and which of them are champion and challenger."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.registry.history import CHAMPION
from components.registry.records import Imported, Lineage, Outcome
from components.settings import UserError
from components.tracking.runs import RUN_DIGEST_TAG

ARTIFACT_FILES = (
    "cfg.json", "sae_weights.safetensors", "training.json", "evaluation.json", "features.parquet", "report.html",
    "lineage.json",
)  # fmt: skip
"""The files that a whole SAE artifact has; all that stands beside them goes into run and model as well."""
LARGE_FILES = ("sae_weights.safetensors", "features.parquet")
"""Those that are in the model alone."""
CHALLENGER = "challenger"
WEIGHTS_TAG, SET_TAG, DATASET_TAG = "sae.weights_sha256", "sae.evaluation_set", "sae.dataset_digest"
DECISION_TAG, REASON_TAG, DONE_TAG = "sae.alias", "sae.alias_reason", "sae.registered"
GATES_TAG, PASSED_TAG = "sae.gates", "sae.gates_passed"
PATH_TAG, ANNOUNCED_TAG = "sae.artifact_path", "sae.announced"
METRIC_PREFIX = "eval."
STABILITY_TAG = "sae.stability"
"""JSON: how many features the champion of that time has, too (`evaluation.stability`), and which version that was."""


def find_version(
    client: MlflowClient, name: str, run_digest: str, weights_sha256: str, finished: bool = False
) -> ModelVersion | None:
    """The version of these weights made by the run of that digest (another kind of device gives other weights); with
    `finished`, only one whose registration came to its end."""
    found = [
        version
        for version in search_versions(client, f"name = '{name}' and tags.`{RUN_DIGEST_TAG}` = '{run_digest}'")
        if version.tags.get(WEIGHTS_TAG) == weights_sha256 and (DONE_TAG in version.tags or not finished)
    ]
    return max(found, key=lambda version: int(version.version)) if found else None


def search_versions(client: MlflowClient, filter_string: str) -> list[ModelVersion]:
    """All pages of a search, by name and then by number. (A search leaves the versions' aliases out.)"""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(filter_string, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda version: (version.name, int(version.version)))


def finished_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """The versions of one registered model whose registration came to its end, by number."""
    return [version for version in search_versions(client, f"name = '{name}'") if DONE_TAG in version.tags]


def mark_announced(client: MlflowClient, name: str, version: str) -> bool:
    """True once for a version, and only while it is champion."""
    champion = champion_of(client, name)
    if champion is None or str(champion.version) != version or ANNOUNCED_TAG in client.get_model_version(name, version).tags:
        return False
    client.set_model_version_tag(name, version, ANNOUNCED_TAG, "true")
    return True


def outcome_of(version: ModelVersion) -> Outcome:
    """Of a finished version, as it was decided."""
    return Outcome(
        registered_model=version.name,
        model_version=int(version.version),
        mlflow_run=version.run_id,
        alias=version.tags[DECISION_TAG],
        alias_reason=version.tags[REASON_TAG],
    )


def version_or_none(client: MlflowClient, name: str, version: str) -> ModelVersion | None:
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def champion_of(client: MlflowClient, name: str) -> ModelVersion | None:
    """None where there is none, or no such model: a server with users refuses to look into one that is not there."""
    if not client.search_registered_models(f"name = '{name}'", max_results=1):
        return None
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def aliases_of(client: MlflowClient, version: ModelVersion) -> list[str]:
    """Aliases that point at the version now (a search leaves them out)."""
    return sorted(client.get_model_version(version.name, version.version).aliases)


def recorded_metrics(version: ModelVersion) -> dict[str, float]:
    """The evaluation's numbers, from the version's tags."""
    tags = {key.removeprefix(METRIC_PREFIX): value for key, value in version.tags.items() if key.startswith(METRIC_PREFIX)}
    return {name: float(value) for name, value in tags.items()}


def recorded_stability(version: ModelVersion) -> dict[str, Any] | None:
    """What `STABILITY_TAG` holds; None where there was no champion to compare with."""
    text = version.tags.get(STABILITY_TAG)
    return None if text is None else dict(json.loads(text))


def resolve_version(client: MlflowClient, reference: str) -> ModelVersion:
    """`NAME/3`, `NAME@champion`, or `NAME` for its champion; also with `models:/` before it."""
    plain = reference.removeprefix("models:/")
    name, at, alias = plain.partition("@")
    try:
        if at:
            return client.get_model_version(name, client.get_model_version_by_alias(name, alias).version)
        name, slash, number = plain.rpartition("/")
        if slash:
            return client.get_model_version(name, number)
        return client.get_model_version(plain, client.get_model_version_by_alias(plain, CHAMPION).version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(
            f"VERSION: there is no '{reference}' in the registry; give NAME/NUMBER, NAME@ALIAS or NAME (its champion), "
            "of those that `sae models list` shows"
        ) from error


def versions_of_dataset(client: MlflowClient, digest: str) -> list[str]:
    """`name/version` of every version whose SAE was trained on the activation dataset of that digest."""
    return [f"{found.name}/{found.version}" for found in search_versions(client, f"tags.`{DATASET_TAG}` = '{digest}'")]


def earlier_metrics(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """Every version's place on the Pareto plot: `version`, `alias` (or None), `l0`, `explained_variance`,
    `loss_recovered` (None where it has none), `evaluation_set`, `run_digest`. Empty where there is no such model."""
    try:
        aliases = {str(version): alias for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise
    shown = ("l0", "explained_variance", "loss_recovered")
    rows = []
    for version in search_versions(client, f"name = '{name}'"):
        metrics = recorded_metrics(version)
        rows.append(
            {
                "version": int(version.version),
                "alias": aliases.get(str(version.version)),
                **{key: metrics.get(key) for key in shown},
                "evaluation_set": version.tags.get(SET_TAG),
                "run_digest": version.tags.get(RUN_DIGEST_TAG),
            }
        )
    return rows


def stored_file(client: MlflowClient, version: ModelVersion, name: str, folder: Path) -> Path:
    """One file of the version's SAE artifact, downloaded into a folder of this machine."""
    inside = version.tags.get(PATH_TAG)
    if inside is None:
        raise UserError(f"VERSION: '{version.name}/{version.version}' was not registered by `sae`")
    uri = f"models:/{version.name}/{version.version}/{inside}/{name}"
    uris = {"tracking_uri": client.tracking_uri, "registry_uri": client._registry_uri}
    return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder), **uris))


def lineage_of(client: MlflowClient, version: ModelVersion) -> Lineage:
    """`lineage.json` from the version's own artifacts."""
    with tempfile.TemporaryDirectory(prefix="sae-lineage-") as scratch:
        return Lineage.model_validate_json(stored_file(client, version, "lineage.json", Path(scratch)).read_bytes())


def reproduction_commands(version: str, imported: Imported | None) -> list[str]:
    """What makes a version again. imported: of its lineage, for an SAE that was made elsewhere."""
    again = f"sae import {imported.address} --config reproduction.yaml" if imported else "sae run reproduction.yaml"
    return [f"sae models show {version} --config > reproduction.yaml", again]
