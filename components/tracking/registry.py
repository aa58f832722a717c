"""The model registry: versions that stand on their own, and the two aliases `champion` and `challenger`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from components.tracking import pyfunc_path

ARTIFACT_FILES = (
    "cfg.json", "sae_weights.safetensors", "training.json", "evaluation.json", "features.parquet", "report.html",
    "lineage.json",
)  # fmt: skip
"""The files of a whole SAE artifact, all of which go into the run and the registered model."""
CHAMPION, CHALLENGER = "champion", "challenger"
_ARTIFACT_TAG, _WEIGHTS_TAG, _SET_TAG = "sae.run_digest", "sae.weights_sha256", "sae.evaluation_set"
_DECISION_TAG, _REASON_TAG, _DONE_TAG = "sae.alias", "sae.alias_reason", "sae.registered"
COMPARED = ("loss_recovered", "l0", "explained_variance", "dead_fraction")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decision:
    alias: str
    reason: str


def decide(metrics: dict[str, Any], champion: dict[str, Any] | None, l0_tolerance: float) -> Decision:
    """Whether an SAE with these metrics becomes champion.

    metrics, champion: `loss_recovered`, `l0` and `evaluation_set`, which names the tokens that they were measured on.
    It does where there is none; otherwise where it recovers more loss with at most `l0_tolerance` times the L0, or no
    less loss with a smaller L0, on the same tokens.
    """
    recovered, l0 = metrics["loss_recovered"], metrics["l0"]
    if recovered is None or not np.isfinite([recovered, l0]).all():
        return Decision(alias=CHALLENGER, reason=f"loss_recovered is {recovered} and l0 {l0}: not comparable numbers")
    if champion is None:
        return Decision(alias=CHAMPION, reason="there was no champion")
    if champion["evaluation_set"] != metrics["evaluation_set"]:
        sets = f"{metrics['evaluation_set']}, not {champion['evaluation_set']}"
        return Decision(
            alias=CHALLENGER, reason=f"not measured on the champion's held-out tokens, model and hook point ({sets})"
        )
    before, l0_before = champion["loss_recovered"], champion["l0"]
    compared = f"loss_recovered {recovered:.5f} against {before:.5f}, l0 {l0:.3f} against {l0_before:.3f}"
    if recovered > before and l0 <= l0_tolerance * l0_before:
        return Decision(alias=CHAMPION, reason=f"recovers more loss at an l0 within {l0_tolerance:g}x: {compared}")
    if recovered >= before and l0 < l0_before:
        return Decision(alias=CHAMPION, reason=f"recovers no less loss with fewer features: {compared}")
    why = "recovers less loss" if recovered < before else f"needs more than {l0_tolerance:g}x the l0"
    if recovered == before and l0 == l0_before:
        why = "is equal"
    return Decision(alias=CHALLENGER, reason=f"{why}: {compared}")


def find_version(
    client: MlflowClient, name: str, run_digest: str, weights_sha256: str, finished: bool = False
) -> ModelVersion | None:
    """The version of these weights made by the run of that digest (another kind of device gives other weights); with
    `finished`, only one whose registration came to its end."""
    found = [
        version
        for version in client.search_model_versions(f"name = '{name}' and tags.`{_ARTIFACT_TAG}` = '{run_digest}'")
        if version.tags.get(_WEIGHTS_TAG) == weights_sha256 and (_DONE_TAG in version.tags or not finished)
    ]
    return max(found, key=lambda version: int(version.version)) if found else None


def champion_of(client: MlflowClient, name: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def aliases_of(client: MlflowClient, version: ModelVersion) -> list[str]:
    """Aliases that point at the version now (a search leaves them out)."""
    return sorted(client.get_model_version(version.name, version.version).aliases)


def register(
    client: MlflowClient,
    name: str,
    folder: Path,
    run_id: str,
    run_digest: str,
    metrics: dict[str, Any],
    weights_sha256: str,
    evaluation_set: str,
    tags: dict[str, str],
    l0_tolerance: float,
) -> tuple[ModelVersion, Decision]:
    """The artifact in `folder` as a version of `name`, with its alias; what a killed call has done is not done again.

    Order: model, version, decision as tags, alias, and last the tag that says that all is done.
    """
    version = find_version(client, name, run_digest, weights_sha256)
    if version is None:
        model = _logged_model(client, folder, run_id, run_digest, weights_sha256)
        numbers = {f"eval.{key}": repr(metrics[key]) for key in COMPARED if metrics[key] is not None}
        everything = {
            **tags,
            **numbers,
            _ARTIFACT_TAG: run_digest,
            _WEIGHTS_TAG: weights_sha256,
            _SET_TAG: evaluation_set,
        }
        version = mlflow.register_model(f"models:/{model.model_id}", name, tags=everything)
    tagged = client.get_model_version(name, version.version).tags
    champion = champion_of(client, name)
    if _DECISION_TAG in tagged and (_DONE_TAG in tagged or _is_same(champion, version)):
        decision = Decision(alias=tagged[_DECISION_TAG], reason=tagged[_REASON_TAG])
    else:
        # Also where a killed call has decided but not acted: another version may have become champion since.
        decision = decide({**metrics, "evaluation_set": evaluation_set}, _recorded_metrics(champion), l0_tolerance)
        client.set_model_version_tag(name, version.version, _REASON_TAG, decision.reason)
        client.set_model_version_tag(name, version.version, _DECISION_TAG, decision.alias)
    if _DONE_TAG not in tagged:
        client.set_registered_model_alias(name, decision.alias, version.version)
        client.set_model_version_tag(name, version.version, _DONE_TAG, "true")
        logger.info("register: %s version %s is %s: %s", name, version.version, decision.alias, decision.reason)
    return client.get_model_version(name, version.version), decision


def _is_same(champion: ModelVersion | None, version: ModelVersion) -> bool:
    return champion is not None and int(champion.version) == int(version.version)


def _recorded_metrics(champion: ModelVersion | None) -> dict[str, Any] | None:
    if champion is None:
        return None
    tags = champion.tags
    return {
        "loss_recovered": float(tags.get("eval.loss_recovered", "nan")),
        "l0": float(tags.get("eval.l0", "nan")),
        "evaluation_set": tags.get(_SET_TAG, "unknown"),
    }


def _logged_model(client: MlflowClient, folder: Path, run_id: str, run_digest: str, weights_sha256: str) -> LoggedModel:
    """The run's model in MLflow, logged now unless a killed call has done it."""
    experiment = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)  # a killed call's; a finished one may stand behind a version
        elif model.tags.get(_WEIGHTS_TAG) == weights_sha256:
            return model
    config = json.loads((folder / "cfg.json").read_text())
    d_in, d_sae = config["d_in"], config["d_sae"]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, d_in))]),
        outputs=Schema(
            [
                TensorSpec(np.dtype(np.float32), (-1, d_sae), "features"),
                TensorSpec(np.dtype(np.float32), (-1, d_in), "reconstruction"),
            ]
        ),
    )
    info = mlflow.pyfunc.log_model(
        name="sae",
        python_model=str(pyfunc_path()),
        artifacts={"sae": str(folder)},
        signature=signature,
        input_example=np.random.default_rng(0).standard_normal((2, d_in)).astype(np.float32),
        pip_requirements=[f"{package}=={installed_version(package)}" for package in ("mlflow", "numpy", "safetensors")],
        metadata={"d_in": d_in, "d_sae": d_sae},
        tags={_ARTIFACT_TAG: run_digest, _WEIGHTS_TAG: weights_sha256},
    )
    return client.get_logged_model(info.model_id)


def versions_of_dataset(client: MlflowClient, digest: str) -> list[str]:
    """`name/version` of every registered version that was trained on the activation dataset of that digest."""
    found = client.search_model_versions(f"tags.`sae.dataset_digest` = '{digest}'")
    return sorted(f"{version.name}/{version.version}" for version in found)
