"""From an SAE artifact to a model version that stands on its own: loading code, weights, evaluation, lineage, card."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from components.registry.card import model_card, shortened
from components.registry.gates import GateResult, Gates
from components.registry.history import CHAMPION, ensure_model
from components.registry.model_files import FILES_TAG, list_files, stored_difference
from components.registry.promotion import Decision, files_gate, promote
from components.registry.records import Lineage
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
    metrics: dict[str, int | float | None]
    evaluation_set: str
    lineage: Lineage
    tags: dict[str, str]
    """Of the version, beside its own."""
    model_tags: dict[str, str]
    """Of the registered model, if this is its first version."""
    optional: dict[str, dict[str, int | float | None]] = field(default_factory=dict)
    """What the evaluation measured besides, by kind."""


def register(run: TrackedRun, candidate: Candidate, gates: Gates) -> tuple[ModelVersion, Decision]:
    """The artifact as a version of its registered model, champion if it passes the gates and challenger otherwise; what a
    killed call has done is not done again.

    Order: model, its metrics, version, decision as tags, alias, and last the tag that says that all is done.
    """
    client, name = run.client, candidate.name
    version = find_version(client, name, candidate.run_digest, candidate.weights_sha256)
    verified = None
    if version is None:
        model, verified = _logged_model(run, candidate)
        run.log_model_metrics(model.model_id, candidate.metrics, candidate.evaluation_set, candidate.lineage.token_url)
        ensure_model(client, name, run.experiment, candidate.model_tags)
        numbers = {f"{METRIC_PREFIX}{key}": repr(value) for key, value in candidate.metrics.items() if _is_number(value)}
        everything = {
            **candidate.tags,
            **numbers,
            RUN_DIGEST_TAG: candidate.run_digest,
            WEIGHTS_TAG: candidate.weights_sha256,
            SET_TAG: candidate.evaluation_set,
            PATH_TAG: f"artifacts/{candidate.folder.name}",
            FILES_TAG: model.tags[FILES_TAG],
        }
        source = f"models:/{model.model_id}"
        version = client.create_model_version(name, source, run.run_id, tags=everything, model_id=model.model_id)
    number = str(version.version)
    tagged = client.get_model_version(name, number).tags
    if DONE_TAG in tagged:
        decision = Decision(alias=tagged[DECISION_TAG], reason=tagged[REASON_TAG], report=json.loads(tagged[GATES_TAG]))
    else:
        decision = promote(client, name, number, gates, verified=verified)
        if decision.alias != CHAMPION:
            client.set_registered_model_alias(name, CHALLENGER, number)
        card = model_card(candidate.name, number, candidate.metrics, candidate.lineage, tagged, decision, candidate.optional)
        client.update_model_version(name, number, shortened(card))
        run.log_text(card, f"sae/{CARD_NAME}")
        client.set_model_version_tag(name, number, DONE_TAG, "true")
        logger.info("register: %s version %s is %s: %s", name, number, decision.alias, decision.reason)
    return client.get_model_version(name, number), replace(decision, entry=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _logged_model(run: TrackedRun, candidate: Candidate) -> tuple[LoggedModel, GateResult | None]:
    """The run's model in MLflow, logged now unless a killed call has done it; and, where its files have been compared with
    what was sent, the result.

    The weights go up once and come back once. What comes back is compared and never run.
    """
    client = run.client
    for model in client.search_logged_models([run.experiment_id], f"source_run_id = '{run.run_id}'"):
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)  # a killed call's; a finished one may stand behind a version
        elif model.tags.get(WEIGHTS_TAG) == candidate.weights_sha256:
            return model, None
    tags = {RUN_DIGEST_TAG: candidate.run_digest, WEIGHTS_TAG: candidate.weights_sha256}
    model = client.create_logged_model(
        run.experiment_id, name="sae", source_run_id=run.run_id, tags=tags, model_type="sparse autoencoder"
    )
    with tempfile.TemporaryDirectory(prefix="sae-model-") as scratch:
        folder = Path(scratch) / "model"
        _save_model(folder, candidate, model, run.run_id)
        _try(folder)
        files_sha256 = list_files(folder)
        client.log_model_artifacts(model.model_id, str(folder))
    wrong = stored_difference(client, f"models:/{model.model_id}", files_sha256)
    if wrong is not None:
        raise OSError(f"the store gave back another model than was sent: {wrong}")
    client.set_logged_model_tags(model.model_id, {FILES_TAG: files_sha256})
    # Only a model whose files have arrived whole is READY, and only a READY one becomes a version.
    run.log_model_output(model.model_id)
    finished = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return finished, files_gate(files_sha256, None)


def _save_model(folder: Path, candidate: Candidate, model: LoggedModel, run_id: str) -> None:
    config = json.loads((candidate.folder / "cfg.json").read_text())
    d_in, d_sae, d_out = config["d_in"], config["d_sae"], config.get("d_out", config["d_in"])
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, d_in))]),
        outputs=Schema(
            [
                TensorSpec(np.dtype(np.float32), (-1, d_sae), "features"),
                TensorSpec(np.dtype(np.float32), (-1, d_out), "reconstruction"),
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


def _try(folder: Path) -> None:
    """Our own copy of the model loads and answers, with numbers, before anybody gets it."""
    loaded = mlflow.pyfunc.load_model(str(folder))
    with np.errstate(over="ignore", invalid="ignore"):
        answer = loaded.predict(loaded.input_example)
    shapes = {spec.name: spec.shape[1] for spec in loaded.metadata.signature.outputs.inputs}
    found = {name: value.shape[1] for name, value in answer.items()}
    assert found == shapes, (found, shapes)
