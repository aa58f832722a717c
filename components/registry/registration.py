"""From an SAE artifact to a model version that stands on its own: loading code, weights, evaluation, lineage, card."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from components.registry.card import model_card
from components.registry.gates import Gates
from components.registry.history import CHAMPION, ensure_model
from components.registry.promotion import Decision, promote
from components.registry.versions import (
    CHALLENGER,
    DECISION_TAG,
    DONE_TAG,
    GATES_TAG,
    METRIC_PREFIX,
    PATH_TAG,
    REASON_TAG,
    SET_TAG,
    WEIGHTS_TAG,
    find_version,
)
from components.storage import file_sha256
from components.tracking.runs import RUN_DIGEST_TAG, TrackedRun

CARD_NAME = "MODEL_CARD.md"
PYFUNC_FILE = Path(__file__).parent / "pyfunc_sae.py"
"""Stored with every registered SAE; it runs there without this project."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An evaluated SAE on its way into the registry."""

    name: str
    """Of the registered model."""
    folder: Path
    """The SAE artifact on this machine."""
    run_digest: str
    weights_sha256: str
    metrics: dict[str, Any]
    evaluation_set: str
    lineage: dict[str, Any]
    tags: dict[str, str]
    """Of the version, beside its own."""
    model_tags: dict[str, str]
    """Of the registered model, if this is its first version."""


def register(run: TrackedRun, candidate: Candidate, gates: Gates) -> tuple[ModelVersion, Decision]:
    """The artifact as a version of its registered model, champion if it passes the gates and challenger otherwise; what a
    killed call has done is not done again.

    Order: model, its metrics, version, decision as tags, alias, and last the tag that says that all is done.
    """
    client, name = run.client, candidate.name
    version = find_version(client, name, candidate.run_digest, candidate.weights_sha256)
    if version is None:
        model = _logged_model(run, candidate)
        run.log_model_metrics(model.model_id, candidate.metrics, candidate.evaluation_set, candidate.lineage["token_url"])
        ensure_model(client, name, run.experiment, candidate.model_tags)
        numbers = {f"{METRIC_PREFIX}{key}": repr(value) for key, value in candidate.metrics.items() if _is_number(value)}
        everything = {
            **candidate.tags,
            **numbers,
            RUN_DIGEST_TAG: candidate.run_digest,
            WEIGHTS_TAG: candidate.weights_sha256,
            SET_TAG: candidate.evaluation_set,
            PATH_TAG: f"artifacts/{candidate.folder.name}",
        }
        source = f"models:/{model.model_id}"
        version = client.create_model_version(name, source, run.run_id, tags=everything, model_id=model.model_id)
    number = str(version.version)
    tagged = client.get_model_version(name, number).tags
    if DONE_TAG in tagged:
        decision = Decision(alias=tagged[DECISION_TAG], reason=tagged[REASON_TAG], report=json.loads(tagged[GATES_TAG]))
    else:
        decision = promote(client, name, number, gates)
        if decision.alias != CHAMPION:
            client.set_registered_model_alias(name, CHALLENGER, number)
        card = model_card(candidate.name, number, candidate.metrics, candidate.lineage, candidate.weights_sha256, decision)
        client.update_model_version(name, number, card)
        run.log_text(card, f"sae/{CARD_NAME}")
        client.set_model_version_tag(name, number, DONE_TAG, "true")
        logger.info("register: %s version %s is %s: %s", name, number, decision.alias, decision.reason)
    return client.get_model_version(name, number), replace(decision, entry=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _logged_model(run: TrackedRun, candidate: Candidate) -> LoggedModel:
    """The run's model in MLflow, logged now unless a killed call has done it."""
    client = run.client
    for model in client.search_logged_models([run.experiment_id], f"source_run_id = '{run.run_id}'"):
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)  # a killed call's; a finished one may stand behind a version
        elif model.tags.get(WEIGHTS_TAG) == candidate.weights_sha256:
            return model
    tags = {RUN_DIGEST_TAG: candidate.run_digest, WEIGHTS_TAG: candidate.weights_sha256}
    model = client.create_logged_model(
        run.experiment_id, name="sae", source_run_id=run.run_id, tags=tags, model_type="sparse autoencoder"
    )
    with tempfile.TemporaryDirectory(prefix="sae-model-") as scratch:
        folder = Path(scratch) / "model"
        _save_model(folder, candidate, model, run.run_id)
        client.log_model_artifacts(model.model_id, str(folder))
    _verify(client, model, candidate)
    # Only a model whose files have arrived whole is READY, and only a READY one becomes a version.
    run.log_model_output(model.model_id)
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _save_model(folder: Path, candidate: Candidate, model: LoggedModel, run_id: str) -> None:
    config = json.loads((candidate.folder / "cfg.json").read_text())
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
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(PYFUNC_FILE),
        artifacts={"sae": str(candidate.folder)},
        signature=signature,
        input_example=np.random.default_rng(0).standard_normal((2, d_in)).astype(np.float32),
        pip_requirements=[f"{package}=={installed_version(package)}" for package in ("mlflow", "numpy", "safetensors")],
        metadata={"d_in": d_in, "d_sae": d_sae},
        mlflow_model=Model(artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id),
    )


def _verify(client: MlflowClient, model: LoggedModel, candidate: Candidate) -> None:
    """Read back what the store holds: the same weights, in a model that loads and answers."""
    with tempfile.TemporaryDirectory(prefix="sae-verify-") as scratch:
        uri = f"models:/{model.model_id}"
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch, tracking_uri=client.tracking_uri))
        stored = file_sha256(folder / "artifacts" / candidate.folder.name / "sae_weights.safetensors")
        if stored != candidate.weights_sha256:
            raise OSError(f"the store gave back other weights ({stored[:16]}) than were sent ({candidate.weights_sha256[:16]})")
        loaded = mlflow.pyfunc.load_model(str(folder))
        answer = loaded.predict(loaded.input_example)
        if not all(np.isfinite(value).all() for value in answer.values()):
            raise FloatingPointError("the SAE gives values that are not finite for its input example")
