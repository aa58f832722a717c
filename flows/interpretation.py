"""Interpretation as a Prefect flow: its spans of text as mapped tasks, on the task runner of the user's choice."""

from __future__ import annotations

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from components import steps
from components.activations.exclusion import Exclusion
from components.evaluation.job import Span
from components.hardware import resolve_device
from components.interpretation.job import InterpretationJob
from components.run.specification import Specification
from flows.mapping import RETRIED, devices, finished, task_runner


@task(name="interpret", cache_policy=NO_CACHE, **RETRIED)
def interpret(specification: str) -> None:
    """Evaluated SAE -> examples of every feature, and their browser, with what other workers have seen; the safety report where
    it is asked for."""
    run = Specification.from_json(specification)
    steps.interpret(run)
    steps.require_safety(run)


@task(name="tokens-that-count", cache_policy=NO_CACHE, **RETRIED)
def find_exclusion(specification: str) -> Exclusion:
    """Training text -> which tokens do not count."""
    return steps.interpretation_exclusion(Specification.from_json(specification))


@task(name="look", cache_policy=NO_CACHE, **RETRIED)
def look(job: InterpretationJob, exclusion: Exclusion, device: str, span: Span) -> None:
    """A span of held-out text -> language model -> what each feature does on it, beside the data."""
    steps.look_at_span(job, exclusion, resolve_device(device), span)


def interpreted(run: Specification) -> None:
    """By workers on the task runner that the configuration names."""
    runner = task_runner(run.config.execution)
    _interpret.with_options(task_runner=runner)(run.config.name, run.to_json())


@flow(name="interpret", flow_run_name="{name}")
def _interpret(name: str, specification: str) -> None:
    run = Specification.from_json(specification)
    execution, job = run.config.execution, steps.interpretation_job(run)
    if job is not None and not (execution.runner == "threads" and execution.workers == 1):
        exclusion = find_exclusion.submit(specification).result()
        named = devices(run.config.device, len(job.spans))
        finished(look.map(unmapped(job), unmapped(exclusion), named, list(job.spans)))
    interpret(specification)
