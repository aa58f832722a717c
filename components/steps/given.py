"""An SAE made elsewhere: measured on a configuration's held-out documents, registered, or written in another format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from components import storage
from components.evaluation import evaluate as evaluation
from components.evaluation.given import require_same_model, require_same_place
from components.evaluation.record import EvaluationRecord, Metrics
from components.interop import hub
from components.interop.circuit_tracer import LAYER
from components.interop.coders import AnySAE, NormalizedSAE
from components.interop.formats import WRITERS, GivenSAE, format_of, given_sae
from components.interop.saelens import WEIGHTS_NAME, saelens_files
from components.language_model.loading import kept_model
from components.records import put_record
from components.redaction import public, redacted
from components.registry.records import Imported, Lineage, Outcome
from components.run import identity
from components.run.coder import placement
from components.run.specification import Specification
from components.settings import UserError
from components.steps.evaluation import Unmeasured, measured_together
from components.steps.reference import reference_of
from components.steps.registration import model_tags
from components.steps.stability import stability_tags
from components.steps.tokens import prepare_tokens
from components.tracking.settings import TrackingSettings


def evaluate_given(run: Specification, sae: str, another_model: bool = False) -> tuple[str, EvaluationRecord]:
    """An SAE made elsewhere -> its metrics on this configuration's held-out documents; its address and the record.

    sae: a folder in one of `interop.formats` (local, `s3://` or `hf://`), or `models:/...` in the model registry. It needs no
    activation dataset. The record, the feature table and the report are put under `evaluations/` of the storage root and into
    an MLflow run. another_model: although the SAE names another language model than the configuration.
    """
    with opened(run.config.tracking, run.config.storage.root, sae) as given:
        url, present = _measured(run, given, sae, another_model)
    with _tracked(run, url, present, sae):
        return url, present


def import_given(run: Specification, sae: str, another_model: bool = False) -> tuple[str, Metrics, Outcome]:
    """As `evaluate_given`, and then into the registry as one of ours, by the same gates: address, metrics, outcome."""
    from components.registry import registration
    from components.registry.gates import load_gates
    from components.registry.versions import find_version, outcome_of

    gates = load_gates(run.config.tracking.gates)
    with opened(run.config.tracking, run.config.storage.root, sae) as given:
        url, present = _measured(run, given, sae, another_model)
        needs_norm = given.config.get("normalize_activations") == "expected_average_only_in"
        coder = _load(
            given,
            torch.device("cpu"),
            reference_of(run, kept_model(run.source, run.device), prepare_tokens(run), run.point).mean_norm
            if needs_norm
            else None,
        )
        imported = Imported(address=redacted(sae), format=given.format.name, content_sha256=given.content_digest())
        metadata = given.metadata
    if isinstance(coder, NormalizedSAE):
        raise UserError("--sae: it normalises each token first; registered models read activations as the model makes them")
    files = saelens_files(coder, {"model_name": run.config.language_model.name, **metadata, **placement(run.reads, run.writes)})
    with _tracked(run, url, present, sae) as open_run, storage.local_copies(url, evaluation.FILES) as folder:
        weights_sha256 = sha256(files[WEIGHTS_NAME]).hexdigest()
        lineage = Lineage(
            mlflow_run=open_run.run_id,
            imported=imported,
            weights_sha256=weights_sha256,
            token_digest=run.token_digest,
            token_url=public(run.token_url),
            code=run.code,
            configuration=public(run.config.model_dump(mode="json")),
        )
        put_record(lineage, str(folder / "lineage.json"))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        registered = find_version(open_run.client, run.registered_model, present.digest, weights_sha256)
        candidate = registration.Candidate(
            name=run.registered_model,
            folder=folder,
            run_digest=present.digest,
            weights_sha256=weights_sha256,
            metrics=present.metrics,
            optional=present.optional,
            evaluation_set=run.evaluation_set(present.tokens),
            lineage=lineage,
            tags={
                "sae.imported": imported.format,
                **({} if registered else stability_tags(open_run, run.registered_model, folder)),
                **run.code,
            },
            model_tags=model_tags(run),
        )
        version, _ = registration.register(open_run, candidate, gates)
    return url, present.metrics, outcome_of(version)


def export_given(settings: TrackingSettings, root: str, sae: str, target: str, format_name: str) -> dict[str, Any]:
    """An SAE, ours or not, as a folder in another format; address, format and files.

    settings, root: of the registry, for `models:/...`.
    """
    if format_name not in WRITERS:
        raise UserError(f"--format: '{format_name}' cannot be written; accepted is {', '.join(WRITERS)}")
    on_hub = target.startswith(hub.PREFIX)
    held = [] if on_hub else storage.list_names(target)
    if held and format_name != "circuit-tracer":
        raise UserError(f"FOLDER: '{target}' holds files already; a folder that is empty or not there yet is accepted")
    with opened(settings, root, sae) as given:
        coder = _load(given, torch.device("cpu"), None)
        try:
            files = WRITERS[format_name](coder, given.metadata)
        except ValueError as error:
            raise UserError(f"--{error}") from error
    for name in {*held} & {*files}:  # of a set of transcoders, to which another layer is added
        if storage.read_bytes(storage.join(target, name)) != files[name]:
            raise UserError(
                f"FOLDER: '{target}' holds another {name} already; a folder for the layers of one model is accepted"
            )
    if on_hub:
        try:
            target = hub.uploaded(target, files)
        except ValueError as error:
            raise UserError(f"FOLDER: {error}") from error
    else:
        for name, content in files.items():
            storage.put_bytes(content, storage.join(target, name))
    return {"url": target, "format": format_name, "files": sorted(files)}


@contextmanager
def opened(settings: TrackingSettings, root: str, sae: str) -> Iterator[GivenSAE]:
    """The SAE that the user names, in a local folder."""
    with _local_folder(settings, root, sae) as folder:
        try:
            given = given_sae(folder, sae)
        except (ValueError, OSError) as error:
            raise UserError(f"--sae: {error}") from error
        yield given


@contextmanager
def _local_folder(settings: TrackingSettings, root: str, sae: str) -> Iterator[Path]:
    if sae.startswith("models:/"):
        from components.registry.download import registered_sae

        with TemporaryDirectory(prefix="sae-") as scratch:
            yield registered_sae(settings, root, sae, Path(scratch))
        return

    place, _, layer = sae.rpartition("/")
    place, layer = (place, layer) if LAYER.fullmatch(layer) else (sae, "")

    def files(names: list[str]) -> tuple[str, ...]:
        names = [name for name in names if not layer or name == layer or not LAYER.fullmatch(name)]
        return format_of(names, redacted(sae)).of(names) or ()

    try:
        on_hub = sae.startswith(hub.PREFIX)
        copies: AbstractContextManager[Path] = (
            nullcontext(hub.fetched(place, files)) if on_hub else storage.local_copies(place, files(storage.list_names(place)))
        )
    except (ValueError, OSError) as error:
        raise UserError(f"--sae: {error}") from error
    with copies as folder:
        yield folder


def _load(given: GivenSAE, device: torch.device, mean_norm: float | None) -> AnySAE:
    try:
        return given.load(device, mean_norm)
    except ValueError as error:
        raise UserError(f"--sae: {error}") from error


def _measured(run: Specification, given: GivenSAE, sae: str, another_model: bool) -> tuple[str, EvaluationRecord]:
    """Where the evaluation is kept, and its record."""
    require_same_place(given.config, run.read_columns, run.written_columns, run.source)
    if not another_model:
        require_same_model(given.config, run.config.language_model.name)
    named = run.evaluation_identity(given.content_digest())
    digest = identity.digest(named)
    url = run.given_evaluation_url(digest)
    present = evaluation.read_evaluation(url, digest)
    if present is None:

        def load(reference: evaluation.Reference) -> AnySAE:
            return _load(given, run.device, reference.mean_norm)

        architecture = given.config["architecture"]
        subject = Unmeasured(run=run, load=load, identity=named, url=url, architecture=architecture, name=sae)
        (present,) = measured_together([subject], prepare_tokens(run))
    return url, present


@contextmanager
def _tracked(run: Specification, url: str, record: EvaluationRecord, sae: str) -> Iterator[Any]:
    """An MLflow run with the evaluation of a given SAE."""
    from components.tracking.runs import tracked_run

    config = run.config
    parameters = {"sae": redacted(sae), **{f"sae.{key}": value for key, value in record.about}}
    tags = {"sae.kind": "evaluation", "sae.evaluation_digest": record.digest}
    name = f"evaluate {record.about.name}"
    opening: AbstractContextManager[Any] = tracked_run(
        config.tracking, config.storage.root, name, record.digest, parameters, tags
    )
    with opening as open_run:
        open_run.log_evaluation(record.metrics)
        for kind, values in record.optional.items():
            open_run.log_evaluation(values, group=kind)
        with storage.local_copies(url, evaluation.FILES) as folder:
            open_run.log_artifact_folder(folder, "evaluation")
        yield open_run
