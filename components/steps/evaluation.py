"""Coder -> its metrics on held-out documents: by one worker, or by several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from components import storage
from components.activations.dataset.forward import resolve_exclusion
from components.activations.exclusion import Exclusion
from components.corpus.manifest import TokenManifest
from components.evaluation import evaluate as evaluation
from components.evaluation import measurements, results
from components.evaluation.columns import OneColumn, together
from components.evaluation.job import EvaluationJob, Span
from components.evaluation.kept import KeptSpans
from components.evaluation.record import About, EvaluationRecord
from components.evaluation.span_totals import Measured, SpanSums
from components.interop.coders import AnySAE
from components.interop.saelens import CONFIG_NAME, WEIGHTS_NAME, load_saelens
from components.language_model.hook_points import parse_hook_point
from components.language_model.loading import LOADING, ModelSource, kept_model, load_tokenizer
from components.run import identity
from components.run.specification import Specification
from components.sae.coder import Coder
from components.settings import UserError
from components.steps.optional import with_optional
from components.steps.reference import held_out_of, reference_of
from components.training.job import TrainingRecord


def evaluate(run: Specification) -> EvaluationRecord:
    """SAE artifact -> its metrics on held-out documents; the evaluation record."""
    return evaluate_together([run])[0]


def evaluate_together(runs: Sequence[Specification]) -> list[EvaluationRecord]:
    """`evaluate` of several that differ by their coders alone, which read and write the same: what the language model computes
    for all of them, it computes once."""
    trained = [require_trained(run) for run in runs]
    found = [run.evaluation_record() for run in runs]
    missing = [place for place, record in enumerate(found) if record is None]
    if missing:
        subjects = [
            Unmeasured(
                run=runs[place],
                load=partial(_loaded, own_sae(runs[place].sae_url, runs[place].device)),
                identity=runs[place].evaluation_identity(trained[place][0].weights_sha256),
                url=runs[place].sae_url,
                architecture=trained[place][0].architecture,
            )
            for place in missing
        ]
        for place, record in zip(missing, measured_together(subjects, trained[0][1]), strict=True):
            found[place] = record
    return [record for record in found if record is not None]


def _loaded(sae: AnySAE, _: evaluation.Reference) -> AnySAE:
    return sae


def evaluation_job(run: Specification) -> EvaluationJob:
    """What there is to measure of the trained SAE, for workers that may be elsewhere."""
    record, token_manifest = require_trained(run)
    return EvaluationJob(
        settings=run.config.evaluation,
        exclude=run.config.activations.exclude,
        source=run.model.source,  # without what is cached
        point=run.point,
        reads=run.read_points,
        text=held_out_of(run, token_manifest),
        sae_url=run.sae_url,
        kept_url=run.kept_spans_url(identity.digest(run.evaluation_identity(record.weights_sha256))),
    )


def evaluation_reference(job: EvaluationJob, device: torch.device) -> evaluation.Reference:
    """What an evaluation takes from training text, once for all spans; on the CPU."""
    settings, model = job.settings, kept_model(job.source, device)
    places = [job.point, *job.reads]
    excluded = resolve_exclusion(job.exclude, job.source, model, places, job.text.url, job.text.manifest, device)
    found = evaluation.reference_statistics(
        model, job.point, job.text, settings.reference_tokens, settings.batch_sequences, device, excluded
    )
    return found.on(torch.device("cpu"))


def measure_span(job: EvaluationJob, mean: torch.Tensor, exclusion: Exclusion, device: torch.device, span: Span) -> SpanSums:
    """The SAE on a span of `measurements.sae_spans`. mean, exclusion: see `measurements.measure_sae`."""

    def measure() -> SpanSums:
        classes = None if job.text.images else evaluation.TokenClasses(load_tokenizer(job.source))
        subject = _subject(job, device, classes)
        return measurements.measure_sae(job.settings, subject, mean, exclusion, span)

    return KeptSpans(job.kept_url).sums("sae", span, measure)


def measure_baselines(
    job: EvaluationJob, reference: evaluation.Reference, l0: float, device: torch.device, span: Span
) -> SpanSums:
    """What the SAE is compared with, on a span of `measurements.baseline_spans`. l0: the SAE's, on all of the text."""

    def measure() -> SpanSums:
        return measurements.measure_baselines(job.settings, _subject(job, device), reference, l0, span)

    return KeptSpans(job.kept_url).sums("baselines", span, measure)


def finish_evaluation(
    run: Specification, measured: Measured, compared: Measured | None, reference: evaluation.Reference | None = None
) -> EvaluationRecord:
    """The merged sums of both passes -> the evaluation record beside the SAE. reference: see `evaluation_reference`."""
    record, token_manifest = require_trained(run)
    sae = own_sae(run.sae_url, run.device)
    predicts = held_out_of(run, token_manifest).predicts
    found = results.finish(run.config.evaluation, measured, compared, sae.W_dec, predicts)
    found = with_optional(run, found, sae, token_manifest)
    named, about = run.evaluation_identity(record.weights_sha256), _about(run, sae, run.sae_url, record.architecture)
    warnings = _warnings({} if reference is None else {run.writes[-1]: reference})
    digest, device = identity.digest(named), torch.device(measured.device)
    written = evaluation.write_evaluation(run.sae_url, digest, named, found, device, about, warnings)
    KeptSpans(run.kept_spans_url(digest)).forget()
    return written


def require_trained(run: Specification) -> tuple[TrainingRecord, TokenManifest]:
    """Training record and token manifest; a UserError unless both are there."""
    record, token_manifest = run.training_record(), run.token_manifest()
    if record is None or token_manifest is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not there yet; run `sae train` first")
    return record, token_manifest


def own_sae(url: str, device: torch.device) -> AnySAE:
    """The coder beside its record at `url`."""
    with storage.local_copies(url, (CONFIG_NAME, WEIGHTS_NAME)) as folder:
        return load_saelens(folder, device)


def _subject(job: EvaluationJob, device: torch.device, classes: evaluation.TokenClasses | None = None) -> measurements.Subject:
    with LOADING:  # the SAE too: torch's default type is another meanwhile
        sae = own_sae(job.sae_url, device)
        model, head = _model_and_head(job.source, device, job.text)
    return measurements.Subject(
        sae=sae, d_sae=sae.d_sae, model=model, point=job.point, text=job.text, device=device, classes=classes, reads=job.reads,
        head=head,
    )  # fmt: skip


def _model_and_head(source: ModelSource, device: torch.device, text: evaluation.HeldOut) -> tuple[nn.Module, nn.Module | None]:
    """The model that hook points are named in; and the image classifier of which it is the body, where it is one."""
    if text.predicts != "classes":
        return kept_model(source, device), None
    head = kept_model(dataclasses.replace(source, with_head=True), device)
    body = head.base_model
    assert isinstance(body, nn.Module)
    return body, head


@dataclass(frozen=True, kw_only=True)
class Unmeasured:
    """An SAE that is to be evaluated."""

    run: Specification
    load: Callable[[evaluation.Reference], AnySAE]
    identity: dict[str, Any]
    """The evaluation's."""
    url: str
    """Where what is found is put."""
    architecture: str
    name: str | None = None

    @property
    def digest(self) -> str:
        return identity.digest(self.identity)

    @property
    def kept_url(self) -> str:
        return self.run.kept_spans_url(self.digest)


def measured_together(subjects: Sequence[Unmeasured], token_manifest: TokenManifest) -> list[EvaluationRecord]:
    """Evaluate SAEs whose runs differ by them alone, and write what was found."""
    run = subjects[0].run
    device, text = run.device, held_out_of(run, token_manifest)
    model, head = _model_and_head(run.source, device, text)
    classes = None if run.of_images else evaluation.TokenClasses(load_tokenizer(run.source))
    found: list[dict[str, evaluation.Evaluation]] = [{} for _ in subjects]
    references: dict[str, evaluation.Reference] = {}
    for number, column in enumerate(run.writes):  # of all coders but a crosscoder, one
        point = parse_hook_point(column)
        reference = references[column] = reference_of(run, model, token_manifest, point)
        saes, several = [subject.load(reference) for subject in subjects], len(run.writes) > 1
        looked_at = [
            evaluation.Subject(
                sae=OneColumn(sae, number) if several and isinstance(sae, Coder) else sae,
                d_sae=sae.d_sae, model=model, point=point, text=text, device=device, classes=classes, reads=run.read_points,
                head=head,
            )
            for sae in saes
        ]  # fmt: skip
        kept = [KeptSpans(storage.join(one.kept_url, str(number)) if several else one.kept_url) for one in subjects]
        for place, one in enumerate(evaluation.evaluate_together(run.config.evaluation, looked_at, reference, kept)):
            found[place][column] = one
    written = []
    for subject, sae, by_column in zip(subjects, saes, found, strict=True):
        whole = together(by_column) if len(by_column) > 1 else by_column[run.writes[0]]
        whole = with_optional(subject.run, whole, sae, token_manifest)
        about = _about(subject.run, sae, subject.url, subject.architecture, subject.name)
        warnings = _warnings(references)
        record = evaluation.write_evaluation(subject.url, subject.digest, subject.identity, whole, device, about, warnings)
        KeptSpans(subject.kept_url).forget()
        written.append(record)
    return written


def _warnings(references: Mapping[str, evaluation.Reference]) -> list[str]:
    found = (reference.sinks_warning(column) for column, reference in references.items())
    return [warning for warning in found if warning is not None]


def _about(run: Specification, sae: AnySAE, url: str, architecture: str, name: str | None = None) -> About:
    return About(
        name=name or url.rstrip("/").rsplit("/", 1)[-1],
        language_model=run.config.language_model.name,
        hook_point=run.hook_point,
        architecture=architecture,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
    )
