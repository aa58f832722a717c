"""Evaluation as a Prefect flow: its spans of text as mapped tasks, on the task runner of the user's choice."""

from __future__ import annotations

from typing import Any

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from components import steps
from components.evaluation.job import EvaluationWork, Span
from components.evaluation.measurements import baseline_spans, sae_spans
from components.evaluation.reference import Reference
from components.evaluation.results import active_features
from components.evaluation.span_totals import SpanSums, merged
from components.hardware import resolve_device
from components.run.config import RunConfig
from components.run.planning import Plan, check, pinned
from flows.mapping import RETRIED, devices, finished, task_runner
from flows.runs import begin

# Every step keeps its result under a digest of all that decides it; Prefect's own cache would only hide that.


@task(name="measure-alone", cache_policy=NO_CACHE, **RETRIED)
def measure_alone(config: RunConfig) -> dict[str, Any]:
    """SAE artifact -> its metrics on held-out documents; a single worker keeps the language model from pass to pass."""
    return steps.evaluate(Plan(config))


@task(name="reference", cache_policy=NO_CACHE, **RETRIED)
def measure_reference(work: EvaluationWork, device: str) -> Reference:
    """Training text -> language model -> the mean, the typical norm, the directions that vary most."""
    return steps.evaluation_reference(work, resolve_device(device))


@task(name="measure", cache_policy=NO_CACHE, **RETRIED)
def measure(work: EvaluationWork, mean: Tensor, limit: float | None, device: str, span: Span) -> SpanSums:
    """A span of held-out text -> language model with the SAE in it -> sums."""
    return steps.measure_span(work, mean, limit, resolve_device(device), span)


@task(name="baselines", cache_policy=NO_CACHE, **RETRIED)
def measure_baselines(work: EvaluationWork, reference: Reference, l0: float, device: str, span: Span) -> SpanSums:
    """A span of held-out text -> language model with each baseline in it -> sums."""
    return steps.measure_baselines(work, reference, l0, resolve_device(device), span)


@flow(name="evaluate", flow_run_name="{config.name}")
def evaluate(config: RunConfig, sae: str | None = None) -> dict[str, Any]:
    """SAE artifact -> its metrics on held-out documents; address and evaluation record.

    sae: an SAE made elsewhere instead of the one that this configuration trains, see `steps.evaluate_given`; this process
    alone measures it.
    """
    begin()
    config = pinned(config)
    plan = Plan(config)
    check(plan)
    if sae is not None:
        return steps.evaluate_given(plan, sae)
    work = steps.evaluation_work(plan)
    record = plan.evaluation_record()
    if record is None:
        alone = config.execution.runner == "threads" and config.execution.workers == 1
        record = measure_alone(config) if alone else _by_workers(plan, work)
    return {"url": plan.sae_url, **record}


def evaluate_on_its_runner(config: RunConfig, sae: str | None = None) -> dict[str, Any]:
    """The flow `evaluate` with the task runner that the configuration names."""
    return evaluate.with_options(task_runner=task_runner(config.execution))(config, sae)


def _by_workers(plan: Plan, work: EvaluationWork) -> dict[str, Any]:
    settings, name, workers = work.settings, plan.config.device, plan.config.execution.workers
    sent = unmapped(work)
    reference = measure_reference.submit(work, name).result()
    limit = settings.norm_limit(reference.median_norm)
    spans = sae_spans(settings, work.text, workers)
    measured = merged(finished(measure.map(sent, unmapped(reference.mean), unmapped(limit), devices(name, len(spans)), spans)))
    l0 = active_features(settings, measured)
    spans = baseline_spans(settings, work.text, workers)
    compared = finished(
        measure_baselines.map(sent, unmapped(reference), unmapped(l0), devices(name, len(spans)), spans) if spans else []
    )
    return steps.finish_evaluation(plan, measured, merged(compared) if compared else None)
