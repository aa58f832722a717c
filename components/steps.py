"""The steps of the line, one function each: from a plan to what the step leaves behind.

Every step returns at once where its result is there already, and continues where a killed one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import torch

from components import storage
from components.activations.dataset import extraction
from components.activations.dataset.manifest import Manifest
from components.corpus import images, tokens
from components.evaluation import evaluate as evaluation
from components.evaluation import measurements as passes
from components.evaluation import results
from components.evaluation.given import require_same_place
from components.evaluation.job import EvaluationWork, Span
from components.evaluation.span_totals import Measured, SpanSums
from components.interop import saelens
from components.interop.saelens import CONFIG_NAME, WEIGHTS_NAME
from components.language_model.loading import LOADING, load_encoder, load_model, load_tokenizer
from components.redaction import public, redacted
from components.run import staleness
from components.run.config import flattened
from components.run.planning import Plan
from components.settings import UserError
from components.tracking.settings import FLOW_RUN_TAG
from components.training import loop, process
from components.training.job import Point, TrainingRecord


def prepare_tokens(plan: Plan) -> dict[str, Any]:
    """Corpus -> token dataset; its manifest."""
    present = plan.token_manifest()
    if present is not None:
        return present
    if plan.of_images:
        return images.prepare_images(plan.config.corpus, plan.image_layout, plan.config.seed, plan.token_url)
    return tokens.prepare_tokens(plan.config.corpus, load_encoder(plan.source), plan.config.seed, plan.token_url)


def extract(plan: Plan) -> Manifest:
    """Token dataset -> activation dataset; its manifest."""
    return extraction.extract(plan.extraction(prepare_tokens(plan)), plan.device)


def train(plan: Plan, on_points: Callable[[list[Point]], None] = lambda points: None) -> TrainingRecord:
    """Activation dataset -> SAE artifact; its training record."""
    return loop.train(plan.training(_activations(plan)), plan.device, on_points)


def launch_training(plan: Plan, on_points: Callable[[list[Point]], None] = lambda points: None) -> TrainingRecord:
    """`train` in a process of its own, which `execution.training_timeout_minutes` and a cancelled run really end."""
    record = plan.training_record()
    if record is not None:
        return train(plan, on_points)
    minutes = plan.config.execution.training_timeout_minutes
    work = plan.training(_activations(plan))
    return process.launch(work, plan.device, on_points, None if minutes is None else minutes * 60)


def training_tokens(plan: Plan) -> int:
    """How many tokens the training reads: whole steps."""
    training = plan.config.training
    return -(-training.tokens // training.batch_size) * training.batch_size


def _activations(plan: Plan) -> Manifest:
    manifest = plan.dataset_manifest()
    if manifest is None:
        raise UserError(f"activations: the dataset {plan.dataset_url} is not there yet; run `sae extract` first")
    return manifest


def evaluate(plan: Plan) -> dict[str, Any]:
    """SAE artifact -> its metrics on held-out documents; the evaluation record."""
    record, token_manifest = _trained(plan)
    present = plan.evaluation_record()
    if present is not None:
        return present
    sae = _own_sae(plan.sae_url, plan.device)
    identity = plan.evaluation_identity(record.weights_sha256)
    return _measured(plan, lambda _: sae, identity, plan.sae_url, token_manifest, plan.config.sae.architecture)


# The same evaluation for several workers: `evaluation_work`, `evaluation_reference`, `measure_span` for every span, then
# `measure_baselines` for every span of those, and `finish_evaluation`.


def evaluation_work(plan: Plan) -> EvaluationWork:
    """What there is to measure of the trained SAE, for workers that may be elsewhere."""
    _, token_manifest = _trained(plan)
    return EvaluationWork(
        settings=plan.config.evaluation,
        source=replace(plan.source),  # without what is cached
        point=plan.point,
        text=evaluation.HeldOut(url=plan.token_url, manifest=token_manifest),
        sae_url=plan.sae_url,
    )


def evaluation_reference(work: EvaluationWork, device: torch.device) -> evaluation.Reference:
    """What an evaluation takes from training text, once for all spans; on the CPU."""
    settings, model = work.settings, load_model(work.source, device)
    found = evaluation.reference_statistics(
        model, work.point, work.text, settings.reference_tokens, settings.batch_sequences, device
    )
    return found.on(torch.device("cpu"))


def measure_span(work: EvaluationWork, mean: torch.Tensor, limit: float | None, device: torch.device, span: Span) -> SpanSums:
    """The SAE on a span of `passes.sae_spans`. mean, limit: see `passes.measure_sae`."""
    subject = _subject(work, device, evaluation.TokenClasses(load_tokenizer(work.source)))
    return passes.measure_sae(work.settings, subject, mean, limit, span)


def measure_baselines(
    work: EvaluationWork, reference: evaluation.Reference, l0: float, device: torch.device, span: Span
) -> SpanSums:
    """What the SAE is compared with, on a span of `passes.baseline_spans`. l0: the SAE's, on all of the text."""
    return passes.measure_baselines(work.settings, _subject(work, device), reference, l0, span)


def finish_evaluation(plan: Plan, measured: Measured, compared: Measured | None) -> dict[str, Any]:
    """The merged sums of both passes -> the evaluation record beside the SAE."""
    record, _ = _trained(plan)
    sae = _own_sae(plan.sae_url, plan.device)
    found = results.finish(plan.config.evaluation, measured, compared, sae.W_dec)
    identity, about = plan.evaluation_identity(record.weights_sha256), _about(plan, sae, plan.sae_url)
    return evaluation.write_evaluation(plan.sae_url, identity, found, torch.device(measured.device), about)


def _trained(plan: Plan) -> tuple[TrainingRecord, dict[str, Any]]:
    """Training record and token manifest; a UserError unless both are there."""
    record, token_manifest = plan.training_record(), plan.token_manifest()
    if record is None or token_manifest is None:
        raise UserError(f"sae: the artifact {plan.sae_url} is not there yet; run `sae train` first")
    return record, token_manifest


def _own_sae(url: str, device: torch.device) -> Any:
    with storage.local_copies(url, (CONFIG_NAME, WEIGHTS_NAME)) as folder:
        return saelens.load_saelens(folder, device)


def _subject(work: EvaluationWork, device: torch.device, classes: evaluation.TokenClasses | None = None) -> passes.Subject:
    with LOADING:  # the SAE too: torch's default type is another meanwhile
        sae, model = _own_sae(work.sae_url, device), load_model(work.source, device)
    return passes.Subject(
        sae=sae, d_sae=sae.d_sae, model=model, point=work.point, text=work.text, device=device, classes=classes
    )


def evaluate_given(plan: Plan, sae: str) -> dict[str, Any]:
    """An SAE made elsewhere -> its metrics on this configuration's held-out documents; url and evaluation record.

    sae: a folder in SAELens' format (local or `s3://`), or `models:/...` in the model registry. It needs no activation
    dataset. The record, the feature table and the report are put under `evaluations/` of the storage root and into an
    MLflow run.
    """
    with _given_folder(plan, sae) as folder:
        try:
            config = saelens.read_config(folder)
            weights = saelens.content_digest(folder)
        except (ValueError, OSError) as error:
            raise UserError(f"--sae: {error}") from error
        require_same_place(config, plan.point, plan.d_in)
        token_manifest = prepare_tokens(plan)
        identity = plan.evaluation_identity(weights)
        url = plan.given_evaluation_url(identity)
        present = evaluation.read_evaluation(url, identity)
        if present is None:

            def load(reference: evaluation.Reference) -> evaluation.Autoencoder:
                try:
                    return saelens.load_saelens(folder, plan.device, reference.mean_norm)
                except ValueError as error:
                    raise UserError(f"--sae: {error}") from error

            present = _measured(plan, load, identity, url, token_manifest, config["architecture"], sae)
    _track_given(plan, url, present, sae)
    return {"url": url, **present}


def _measured(
    plan: Plan,
    load: Callable[[evaluation.Reference], evaluation.Autoencoder],
    identity: dict[str, Any],
    url: str,
    token_manifest: dict[str, Any],
    architecture: str,
    name: str | None = None,
) -> dict[str, Any]:
    """Evaluate the SAE that `load` gives and write what was found to `url`."""
    settings, device = plan.config.evaluation, plan.device
    model = load_model(plan.source, device)
    text = evaluation.HeldOut(url=plan.token_url, manifest=token_manifest)
    reference = evaluation.reference_statistics(
        model, plan.point, text, settings.reference_tokens, settings.batch_sequences, device
    )
    sae: Any = load(reference)
    classes = evaluation.TokenClasses(load_tokenizer(plan.source))
    found = evaluation.evaluate(settings, sae, sae.d_sae, model, plan.point, text, reference, device, classes)
    about = _about(plan, sae, url) | {"architecture": architecture}
    return evaluation.write_evaluation(url, identity, found, device, about if name is None else about | {"name": name})


def _about(plan: Plan, sae: Any, url: str) -> dict[str, Any]:
    """What the report says of an SAE."""
    return {
        "name": url.rstrip("/").rsplit("/", 1)[-1],
        "language_model": plan.config.language_model.name,
        "hook_point": plan.hook_point,
        "architecture": plan.config.sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
    }


@contextmanager
def _given_folder(plan: Plan, sae: str) -> Iterator[Path]:
    """A local folder with the files of an SAE that the user names."""
    if sae.startswith("models:/"):
        from components.registry.download import registered_sae

        with TemporaryDirectory(prefix="sae-") as folder:
            yield registered_sae(plan.config.tracking, plan.config.storage.root, sae, Path(folder))
        return
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not storage.exists(storage.join(sae, name)):
            raise UserError(f"--sae: '{sae}' holds no {name}; a folder in SAELens' format or models:/... is accepted")
    with storage.local_copies(sae, (CONFIG_NAME, WEIGHTS_NAME)) as folder:
        yield folder


def _track_given(plan: Plan, url: str, record: dict[str, Any], sae: str) -> None:
    """The evaluation of a given SAE into an MLflow run of its own."""
    from components.tracking.runs import tracked_run

    config = plan.config
    parameters = {"sae": redacted(sae), **{f"sae.{key}": value for key, value in record["about"].items()}}
    tags = {"sae.kind": "evaluation", "sae.evaluation_digest": record["digest"]}
    name = f"evaluate {record['about']['name']}"
    with tracked_run(config.tracking, config.storage.root, name, record["digest"], parameters, tags) as run:
        run.log_evaluation(record["metrics"])
        with storage.local_copies(url, evaluation.FILES) as folder:
            run.log_artifact_folder(folder, "evaluation")


def tracked(plan: Plan, tags: dict[str, str]) -> AbstractContextManager[Any]:
    """The open MLflow run of this plan; `tags` beside its own."""
    from components.tracking.runs import tracked_run

    config = plan.config
    return tracked_run(
        config.tracking,
        config.storage.root,
        config.name,
        plan.run_digest,
        flattened(config.model_dump(mode="json")),
        {**tags, "sae.dataset_digest": plan.dataset_digest, "sae.digest": plan.sae_digest},
    )


def require_evaluated(plan: Plan) -> tuple[TrainingRecord, dict[str, Any], Manifest]:
    """Training record, evaluation record and dataset manifest; a UserError unless all three are there."""
    record, measured, manifest = plan.training_record(), plan.evaluation_record(), plan.dataset_manifest()
    if record is None or measured is None or manifest is None:
        raise UserError(f"sae: the artifact {plan.sae_url} is not trained and evaluated yet; run `sae evaluate` first")
    return record, measured, manifest


def log_results(plan: Plan, run: Any) -> dict[str, Any]:
    """Everything that is known of the trained and evaluated SAE into its MLflow run; the SAE's lineage.

    run: the open run that `tracked` gave.
    """
    from components.evaluation import charts

    trained, measured, manifest = require_evaluated(plan)
    metrics = measured["metrics"]
    run.complete_points(trained.curves)
    run.log_dataset(manifest, plan.dataset_url)
    run.log_evaluation(metrics)
    lineage = {
        "mlflow_run": run.run_id,
        "prefect_flow_run": run.tags.get(FLOW_RUN_TAG),
        "sae_digest": plan.sae_digest,
        "weights_sha256": trained.weights_sha256,
        "dataset_digest": plan.dataset_digest,
        "dataset_url": plan.dataset_url,
        "token_digest": plan.token_digest,
        "token_url": plan.token_url,
        "code": run.code,
        "configuration": plan.config.model_dump(mode="json"),
    }
    lineage = public(lineage)
    storage.put_json(lineage, storage.join(plan.sae_url, "lineage.json"))
    with storage.local_copies(plan.sae_url, ["features.parquet"]) as folder:
        features = pq.read_table(folder / "features.parquet")
    evaluation.write_report(plan.sae_url, measured, features, _earlier_versions(plan, run.client, metrics))
    run.log_figures(
        {
            "training": charts.training(trained.curves),
            "cross_entropy": charts.losses(metrics),
            "feature_density": charts.density(features["density"].to_numpy()),
        }
    )
    return lineage


def register(plan: Plan, run: Any) -> dict[str, Any]:
    """The SAE into the registry, as champion if it passes the gates; version, alias and reason.

    run: the open run that `tracked` gave.
    """
    from components.registry import registration
    from components.registry import versions as registry
    from components.registry.gates import load_gates

    gates = load_gates(plan.config.tracking.gates)
    trained, measured, _ = require_evaluated(plan)
    metrics = measured["metrics"]
    lineage = log_results(plan, run)
    flow_run = {FLOW_RUN_TAG: run.tags[FLOW_RUN_TAG]} if FLOW_RUN_TAG in run.tags else {}
    names = sorted({*registry.ARTIFACT_FILES, *storage.list_names(plan.sae_url)})
    with storage.local_copies(plan.sae_url, names) as folder:
        run.log_artifact_folder(folder, "sae", leave_out=registry.LARGE_FILES)
        candidate = registration.Candidate(
            name=plan.registered_model,
            folder=folder,
            run_digest=plan.run_digest,
            weights_sha256=trained.weights_sha256,
            metrics=metrics,
            evaluation_set=plan.evaluation_set(metrics["evaluation_tokens"]),
            lineage=lineage,
            tags={
                "sae.digest": plan.sae_digest,
                registry.DATASET_TAG: plan.dataset_digest,
                **staleness.version_tags(plan, {}),
                **flow_run,
                **run.code,
            },
            model_tags={
                "sae.language_model": plan.config.language_model.name,
                "sae.hook_point": plan.hook_point,
                "sae.purpose": plan.config.tracking.purpose or "general",
            },
        )
        version, decision = registration.register(run, candidate, gates)
    outcome = {
        "registered_model": version.name,
        "model_version": int(version.version),
        "alias": decision.alias,
        "alias_reason": decision.reason,
    }
    run.set_tags({f"sae.{key}": value for key, value in outcome.items()})
    return outcome


def comparison(plan: Plan, outcome: dict[str, Any]) -> dict[str, Any]:
    """The registered version of `outcome` beside the champion that it was measured against: `champion` (a version, None
    where there was none), and `metrics` and `gates` as rows of a table."""
    from components.registry import catalogue
    from components.tracking import store

    client = store.connect(plan.config.tracking, plan.config.storage.root)
    return catalogue.against_champion(client, outcome["registered_model"], str(outcome["model_version"]))


def is_news(plan: Plan, outcome: dict[str, Any]) -> bool:
    """Whether the registered version of `outcome` is champion and nobody has been told; asked again, it is no news."""
    from components.registry import versions as registry
    from components.tracking import store

    client = store.connect(plan.config.tracking, plan.config.storage.root)
    return registry.mark_announced(client, outcome["registered_model"], str(outcome["model_version"]))


def run_address(plan: Plan, run_id: str) -> str | None:
    """Where the MLflow UI shows a run; None where there is no server."""
    from components.tracking import store

    client = store.connect(plan.config.tracking, plan.config.storage.root)
    return store.run_address(client, client.get_run(run_id).info.experiment_id, run_id)


def _earlier_versions(plan: Plan, client: Any, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Registered versions that were measured on the same tokens, for the report's comparison."""
    from components.registry.versions import earlier_metrics

    same, names = plan.evaluation_set(metrics["evaluation_tokens"]), ("l0", "explained_variance", "loss_recovered")
    return [
        {"name": f"version {version['version']}", **{name: version[name] for name in names}}
        for version in earlier_metrics(client, plan.registered_model)
        if version["evaluation_set"] == same
        and version["run_digest"] != plan.run_digest
        and all(version[name] is not None for name in names)
    ]


def finished_run(plan: Plan) -> dict[str, Any] | None:
    """The outcome of an earlier run of this very plan that is whole from tokens to registry, or None."""
    record = plan.training_record()
    if plan.dataset_manifest() is None or record is None or plan.evaluation_record() is None:
        return None
    from components.registry import versions as registry
    from components.tracking import runs, store

    config = plan.config
    if not store.database_exists(config.tracking, config.storage.root):
        return None
    client = store.connect(config.tracking, config.storage.root)
    run = runs.find_run(client, config.tracking.experiment, plan.run_digest)
    version = registry.find_version(client, plan.registered_model, plan.run_digest, record.weights_sha256, finished=True)
    if run is None or version is None or run.info.status != "FINISHED":
        return None
    return {
        "mlflow_run": run.info.run_id,
        "registered_model": version.name,
        "model_version": int(version.version),
        "alias": ", ".join(registry.aliases_of(client, version)) or None,
        "alias_reason": version.tags["sae.alias_reason"],
    }


def summary(plan: Plan, outcome: dict[str, Any], seconds: dict[str, float], reused: bool) -> dict[str, Any]:
    """What a run prints and returns: digests, paths, metrics, run, version, alias, seconds per step."""
    from components.tracking.store import tracking_uri

    measured = plan.evaluation_record()
    assert measured is not None
    return {
        "name": plan.config.name,
        "reused": reused,
        "digests": {"tokens": plan.token_digest, "activations": plan.dataset_digest, "sae": plan.sae_digest},
        "paths": {"tokens": plan.token_url, "activations": plan.dataset_url, "sae": plan.sae_url},
        "metrics": measured["metrics"],
        "mlflow_uri": redacted(tracking_uri(plan.config.tracking, plan.config.storage.root)),
        **outcome,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
