"""Evaluation as a Prefect flow: its spans of text as mapped tasks, on the task runner of the user's choice."""

from __future__ import annotations

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from components import steps
from components.activations.exclusion import Exclusion
from components.evaluation.job import EvaluationJob, Span
from components.evaluation.kept import parts
from components.evaluation.measurements import baseline_spans, sae_spans
from components.evaluation.record import EvaluationRecord
from components.evaluation.reference import Reference
from components.evaluation.results import active_features
from components.evaluation.span_totals import SpanSums, merged
from components.hardware import resolve_device
from components.run.config import RunConfig
from components.run.specification import Specification
from flows.mapping import RETRIED, devices, finished, task_runner
from flows.runs import begin_with

# Every step keeps its result under a digest of all that decides it; Prefect's own cache would only hide that.


@task(name="measure-alone", cache_policy=NO_CACHE, **RETRIED)
def measure_alone(specification: str) -> EvaluationRecord:
    """SAE artifact -> its metrics on held-out documents, by one worker."""
    return steps.evaluate(Specification.from_json(specification))


@task(name="reference", cache_policy=NO_CACHE, **RETRIED)
def measure_reference(job: EvaluationJob, device: str) -> Reference:
    """Training text -> language model -> the mean, the typical norm, the directions that vary most."""
    return steps.evaluation_reference(job, resolve_device(device))


@task(name="measure", cache_policy=NO_CACHE, **RETRIED)
def measure(job: EvaluationJob, mean: Tensor, exclusion: Exclusion, device: str, span: Span) -> SpanSums:
    """A span of held-out text -> language model with the SAE in it -> sums."""
    return steps.measure_span(job, mean, exclusion, resolve_device(device), span)


@task(name="baselines", cache_policy=NO_CACHE, **RETRIED)
def measure_baselines(job: EvaluationJob, reference: Reference, l0: float, device: str, span: Span) -> SpanSums:
    """A span of held-out text -> language model with each baseline in it -> sums."""
    return steps.measure_baselines(job, reference, l0, resolve_device(device), span)


@flow(name="evaluate", flow_run_name="{config.title}")
def evaluate(config: RunConfig, sae: str | None = None) -> tuple[str, EvaluationRecord]:
    """SAE artifact -> its metrics on held-out documents; address and evaluation record.

    sae: an SAE made elsewhere instead of the one that this configuration trains, see `steps.evaluate_given`; this process
    alone measures it.
    """
    run = begin_with(config)
    return steps.evaluate_given(run, sae) if sae is not None else evaluated(run)


def evaluated(run: Specification) -> tuple[str, EvaluationRecord]:
    """Address and evaluation record, by workers on the task runner that the configuration names."""
    runner = task_runner(run.config.execution)
    return run.sae_url, _evaluate.with_options(task_runner=runner)(run.config.name, run.to_json())


@flow(name="spans", flow_run_name="{name}")
def _evaluate(name: str, specification: str) -> EvaluationRecord:
    run = Specification.from_json(specification)
    job = steps.evaluation_job(run)
    record = run.evaluation_record()
    if record is None:
        execution = run.config.execution
        # a crosscoder is measured column by column, by one worker
        alone = (execution.runner == "threads" and execution.workers == 1) or len(run.writes) > 1
        record = measure_alone(specification) if alone else _by_workers(run, job)
    return record


def _by_workers(run: Specification, job: EvaluationJob) -> EvaluationRecord:
    settings, name, workers = job.settings, run.config.device, run.config.execution.workers
    sent, number = unmapped(job), parts(settings.tokens, workers)
    reference = measure_reference.submit(job, name).result()
    spans = sae_spans(settings, job.text, number)
    measured = merged(
        finished(measure.map(sent, unmapped(reference.mean), unmapped(reference.exclusion), devices(name, len(spans)), spans))
    )
    l0 = active_features(settings, measured, job.text.predicts)
    spans = baseline_spans(settings, job.text, number)
    compared = finished(
        measure_baselines.map(sent, unmapped(reference), unmapped(l0), devices(name, len(spans)), spans) if spans else []
    )
    return steps.finish_evaluation(run, measured, merged(compared) if compared else None, reference)
