"""Extraction as a Prefect flow: its chunks and shards as mapped tasks, on the task runner of the user's choice."""

from __future__ import annotations

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from components import steps, storage
from components.activations.dataset import extraction
from components.activations.dataset.job import Extraction
from components.corpus.manifest import TokenManifest
from components.hardware import resolve_device
from components.run.config import RunConfig
from components.run.specification import Specification
from flows.mapping import RETRIED, devices, finished, shares, task_runner
from flows.runs import begin_with

# Every step keeps its result under a digest of all that decides it; Prefect's own cache would only hide that.


@task(name="tokens", cache_policy=NO_CACHE, **RETRIED)
def prepare_tokens(specification: str) -> TokenManifest:
    """Corpus -> token dataset; its manifest."""
    return steps.prepare_tokens(Specification.from_json(specification))


@task(name="scatter", cache_policy=NO_CACHE, **RETRIED)
def scatter(work: Extraction, device: str, chunks: range) -> None:
    """Token sequences -> language model -> chunks of rows, scattered over buckets."""
    extraction.scatter(work, resolve_device(device), chunks)


@task(name="shuffle", cache_policy=NO_CACHE, **RETRIED)
def shuffle(work: Extraction, buckets: range) -> None:
    """Buckets -> shards."""
    extraction.gather(work, buckets)


@flow(name="extract", flow_run_name="{config.title}")
def extract(config: RunConfig) -> int:
    """From a corpus to an activation dataset; the number of stored tokens."""
    return extracted(begin_with(config, only_data=True))


@flow(name="chunks-and-shards", flow_run_name="{name}")
def _extract(name: str, specification: str) -> int:
    run = Specification.from_json(specification)
    config, tokens = run.config, prepare_tokens(specification)
    if config.activations.mode == "online" and (known := run.dataset_manifest()) is not None:
        return known.tokens
    work = steps.extraction_of(run, tokens)
    with storage.exclusive(work.url):
        manifest = extraction.finish(work)
        if manifest is None:
            extraction.prepare(work)
            workers, sent = config.execution.workers, unmapped(work)
            chunks = shares(work.chunks, workers)
            finished(scatter.map(sent, devices(config.device, len(chunks)), chunks))
            finished(shuffle.map(sent, shares(work.buckets, workers)))
            manifest = extraction.commit(work)
    return steps.extracted(run, tokens, manifest).tokens


def extracted(run: Specification) -> int:
    """The number of stored tokens, by workers on the task runner that the configuration names; of generations that are made
    while the training goes on, those of the first one."""
    runner = task_runner(run.config.execution)
    return _extract.with_options(task_runner=runner)(run.config.name, run.to_json())
