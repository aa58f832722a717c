"""Coder and metrics -> MLflow: the run's artifacts, a model version with an alias."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pyarrow.parquet as pq

from components import storage
from components.activations.dataset.manifest import Manifest
from components.evaluation import evaluate as evaluation
from components.evaluation.record import EvaluationRecord
from components.records import put_record
from components.redaction import public
from components.registry.records import Lineage, Outcome, StartedFrom
from components.run import staleness
from components.run.config import flattened
from components.run.specification import Specification
from components.run.start import START_TAG
from components.settings import UserError
from components.steps.interpretable import GROUP, explanation_metrics, feature_map
from components.steps.stability import stability_tags
from components.tracking.settings import FLOW_RUN_TAG
from components.training.job import TrainingRecord


def tracked(run: Specification, tags: dict[str, str]) -> AbstractContextManager[Any]:
    """The open MLflow run of this specification; `tags` beside its own."""
    from components.tracking.runs import tracked_run

    config = run.config
    return tracked_run(
        config.tracking,
        config.storage.root,
        config.title,
        run.run_digest,
        flattened(config.model_dump(mode="json")),
        {
            **tags,
            "sae.dataset_digest": run.dataset_digest,
            "sae.digest": run.sae_digest,
            START_TAG: run.start.location if run.start else "new weights",
        },
        run.code,
    )


def require_evaluated(run: Specification) -> tuple[TrainingRecord, EvaluationRecord, Manifest]:
    """Training record, evaluation record and dataset manifest; a UserError unless all three are there."""
    record, measured, manifest = run.training_record(), run.evaluation_record(), run.dataset_manifest()
    if record is None or measured is None or manifest is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not trained and evaluated yet; run `sae evaluate` first")
    return record, measured, manifest


def log_results(run: Specification, open_run: Any) -> Lineage:
    """Everything that is known of the trained and evaluated SAE into its MLflow run; the SAE's lineage.

    open_run: the one that `tracked` gave.
    """
    from components.evaluation import charts

    trained, measured, manifest = require_evaluated(run)
    metrics = measured.metrics
    open_run.complete_points(trained.curves)
    open_run.log_dataset(manifest, run.dataset_url, run.dataset_digest)
    open_run.log_evaluation(metrics)
    for kind, values in measured.optional.items():
        open_run.log_evaluation(values, group=kind)
    open_run.log_evaluation(explanation_metrics(run), group=GROUP)
    lineage = Lineage(
        mlflow_run=open_run.run_id,
        prefect_flow_run=open_run.tags.get(FLOW_RUN_TAG),
        sae_digest=run.sae_digest,
        weights_sha256=trained.weights_sha256,
        dataset_digest=run.dataset_digest,
        dataset_url=public(run.dataset_url),
        token_digest=run.token_digest,
        token_url=public(run.token_url),
        code=run.code,
        start=None if run.start is None else StartedFrom(**public(run.start.model_dump())),
        configuration=public(run.config.model_dump(mode="json")),
    )
    put_record(lineage, storage.join(run.sae_url, "lineage.json"))
    with storage.local_copies(run.sae_url, ["features.parquet"]) as folder:
        features = pq.read_table(folder / "features.parquet")
    if earlier := _earlier_versions(run, open_run.client, measured):  # else the evaluation's own report says it all
        evaluation.write_report(run.sae_url, measured, features, earlier)
    features_map = feature_map(run)
    open_run.log_figures(
        {
            **({} if features_map is None else {"feature_map": features_map}),
            "training": charts.training(trained.curves),
            **({"cross_entropy": charts.losses(metrics)} if "ce_loss_sae" in metrics else {}),
            "feature_density": charts.density(features["density"].to_numpy()),
        }
    )
    return lineage


def register(run: Specification, open_run: Any) -> Outcome:
    """The SAE into the registry, as champion if it passes the gates; version, alias and reason.

    open_run: the one that `tracked` gave.
    """
    from components.registry import registration
    from components.registry import versions as registry
    from components.registry.gates import load_gates

    gates = load_gates(run.config.tracking.gates)
    trained, measured, _ = require_evaluated(run)
    metrics = measured.metrics
    lineage = log_results(run, open_run)
    # Once, before the version is there: later the champion may be the version itself.
    registered = registry.find_version(open_run.client, run.registered_model, run.run_digest, trained.weights_sha256)
    flow_run = {FLOW_RUN_TAG: open_run.tags[FLOW_RUN_TAG]} if FLOW_RUN_TAG in open_run.tags else {}
    names = sorted({*registry.ARTIFACT_FILES, *storage.list_names(run.sae_url)})
    with storage.local_copies(run.sae_url, names) as folder:
        open_run.log_artifact_folder(folder, "sae", leave_out=registry.LARGE_FILES)
        candidate = registration.Candidate(
            name=run.registered_model,
            folder=folder,
            run_digest=run.run_digest,
            weights_sha256=trained.weights_sha256,
            metrics=metrics,
            optional=measured.optional,
            evaluation_set=run.evaluation_set(measured.tokens),
            lineage=lineage,
            tags={
                "sae.digest": run.sae_digest,
                registry.DATASET_TAG: run.dataset_digest,
                **staleness.version_tags(run),
                **{f"{registry.METRIC_PREFIX}{name}": repr(value) for name, value in explanation_metrics(run).items()},
                **({} if registered else stability_tags(open_run, run.registered_model, folder)),
                **flow_run,
                **run.code,
            },
            model_tags=model_tags(run),
        )
        version, _ = registration.register(open_run, candidate, gates)
    outcome = registry.outcome_of(version)
    open_run.set_tags({f"sae.{key}": value for key, value in outcome.model_dump(exclude={"mlflow_run"}).items()})
    return outcome


def model_tags(run: Specification) -> dict[str, str]:
    """Of the registered model, if this is its first version."""
    return {
        "sae.language_model": run.config.language_model.name,
        "sae.hook_point": run.hook_point,
        "sae.purpose": run.config.tracking.purpose or "general",
    }


def _earlier_versions(run: Specification, client: Any, measured: EvaluationRecord) -> list[dict[str, Any]]:
    """Registered versions that were measured on the same tokens, for the report's comparison."""
    from components.registry.versions import earlier_metrics

    same, names = run.evaluation_set(measured.tokens), ("l0", "explained_variance", "loss_recovered")
    return [
        {"name": f"version {version['version']}", **{name: version[name] for name in names}}
        for version in earlier_metrics(client, run.registered_model)
        if version["evaluation_set"] == same
        and version["run_digest"] != run.run_digest
        and all(version[name] is not None for name in names if name in measured.metrics)
    ]
