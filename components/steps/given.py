"""An SAE made elsewhere -> its metrics on a configuration's held-out documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from components import storage
from components.evaluation import evaluate as evaluation
from components.evaluation.given import require_same_place
from components.evaluation.record import EvaluationRecord
from components.interop import saelens
from components.interop.saelens import CONFIG_NAME, WEIGHTS_NAME
from components.redaction import redacted
from components.run import identity
from components.run.specification import Specification
from components.settings import UserError
from components.steps.evaluation import AnySAE, measured_alone
from components.steps.tokens import prepare_tokens


def evaluate_given(run: Specification, sae: str) -> tuple[str, EvaluationRecord]:
    """An SAE made elsewhere -> its metrics on this configuration's held-out documents; its address and the record.

    sae: a folder in SAELens' format (local or `s3://`), or `models:/...` in the model registry. It needs no activation
    dataset. The record, the feature table and the report are put under `evaluations/` of the storage root and into an
    MLflow run.
    """
    with _given_folder(run, sae) as folder:
        try:
            config = saelens.read_config(folder)
            weights = saelens.content_digest(folder)
        except (ValueError, OSError) as error:
            raise UserError(f"--sae: {error}") from error
        require_same_place(config, run.point, run.d_in)
        token_manifest = prepare_tokens(run)
        named = run.evaluation_identity(weights)
        digest = identity.digest(named)
        url = run.given_evaluation_url(digest)
        present = evaluation.read_evaluation(url, digest)
        if present is None:

            def load(reference: evaluation.Reference) -> AnySAE:
                try:
                    return saelens.load_saelens(folder, run.device, reference.mean_norm)
                except ValueError as error:
                    raise UserError(f"--sae: {error}") from error

            present = measured_alone(run, load, named, url, token_manifest, config["architecture"], sae)
    _track_given(run, url, present, sae)
    return url, present


@contextmanager
def _given_folder(run: Specification, sae: str) -> Iterator[Path]:
    """A local folder with the files of an SAE that the user names."""
    if sae.startswith("models:/"):
        from components.registry.download import registered_sae

        with TemporaryDirectory(prefix="sae-") as folder:
            yield registered_sae(run.config.tracking, run.config.storage.root, sae, Path(folder))
        return
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not storage.exists(storage.join(sae, name)):
            raise UserError(f"--sae: '{sae}' holds no {name}; a folder in SAELens' format or models:/... is accepted")
    with storage.local_copies(sae, (CONFIG_NAME, WEIGHTS_NAME)) as folder:
        yield folder


def _track_given(run: Specification, url: str, record: EvaluationRecord, sae: str) -> None:
    """The evaluation of a given SAE into an MLflow run of its own."""
    from components.tracking.runs import tracked_run

    config = run.config
    parameters = {"sae": redacted(sae), **{f"sae.{key}": value for key, value in record.about}}
    tags = {"sae.kind": "evaluation", "sae.evaluation_digest": record.digest}
    name = f"evaluate {record.about.name}"
    with tracked_run(config.tracking, config.storage.root, name, record.digest, parameters, tags) as open_run:
        open_run.log_evaluation(record.metrics)
        with storage.local_copies(url, evaluation.FILES) as folder:
            open_run.log_artifact_folder(folder, "evaluation")
