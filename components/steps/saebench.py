"""An evaluated coder -> SAEBench's `core` result beside its evaluation."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pyarrow.parquet as pq

from components import storage
from components.evaluation import saebench
from components.evaluation.measurements import Subject
from components.evaluation.record import EvaluationRecord
from components.interop.coders import AnySAE, NormalizedSAE
from components.interop.saelens import CONFIG_NAME, read_config
from components.language_model.loading import LOADING, kept_model
from components.run.checks import require_text
from components.run.specification import Specification
from components.sae.coder import Coder
from components.settings import UserError
from components.steps.evaluation import own_sae
from components.steps.given import opened
from components.steps.reference import exclusion_of, held_out_of, reference_of
from components.steps.tokens import prepare_tokens

FOLDER = "saebench"


def require_autoencoder(run: Specification) -> None:
    """A UserError unless the coder writes what it reads."""
    require_text(run, "--format: SAEBench's core result is of")
    if run.read_points:
        raise UserError(f"--format: SAEBench's core result is of SAEs; a coder at '{run.hook_point}' has none")


def write_saebench(run: Specification, url: str, record: EvaluationRecord, sae: str | None = None) -> str:
    """The address of the file. url, record: of the evaluation. sae: as `evaluate_given` takes it; the specification's own coder
    where it is None."""
    require_autoencoder(run)
    with ExitStack() as stack:
        if sae is None:
            config = read_config(stack.enter_context(storage.local_copies(url, (CONFIG_NAME,))))
            coder = own_sae(url, run.device)
        else:
            given = stack.enter_context(opened(run.config.tracking, run.config.storage.root, sae))
            config, needs_norm = given.config, given.config.get("normalize_activations") == "expected_average_only_in"
            model, manifest = kept_model(run.source, run.device), prepare_tokens(run)
            coder = given.load(run.device, reference_of(run, model, manifest, run.point).mean_norm if needs_norm else None)
        inner = coder.coder if isinstance(coder, NormalizedSAE) else coder
        if inner.reads != inner.writes:
            raise UserError("--format: SAEBench's core result is of SAEs; this coder does not write what it reads")
        with storage.local_copies(url, ("features.parquet",)) as folder:
            table = pq.read_table(folder / "features.parquet", columns=["density", "mean_activation"])
        result = saebench.core_result(
            record,
            table["density"].to_numpy(),
            table["mean_activation"].to_numpy(),
            _sums(run, coder),
            _weights(inner),
            _about(run, config),
        )
    address = storage.join(url, FOLDER, saebench.file_name(result))
    storage.put_json(result, address)
    return address


def _sums(run: Specification, coder: AnySAE) -> saebench.CoreSums:
    manifest, device = prepare_tokens(run), run.device
    with LOADING:
        model = kept_model(run.source, device)
    text = held_out_of(run, manifest)
    subject = Subject(sae=coder, d_sae=coder.d_sae, model=model, point=run.point, text=text, device=device)
    return saebench.measure_core(run.config.evaluation.tokens, subject, exclusion_of(run, model, manifest))


def _weights(coder: Coder) -> dict[str, Any]:
    exported = coder.exported().tensors
    return {"W_enc": exported["W_enc"], "W_dec": exported["W_dec"], "b_enc": exported.get("b_enc", exported.get("b_mag"))}


def _about(run: Specification, config: dict[str, Any]) -> dict[str, Any]:
    settings = run.config
    return {
        "release": settings.name,
        "model_name": settings.language_model.name,
        "llm_dtype": settings.language_model.dtype,
        "dataset": settings.corpus.title,
        "context_size": settings.corpus.context_length,
        "sae_cfg_dict": config,
    }
