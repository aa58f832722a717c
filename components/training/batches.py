"""Batches on their way to coders: read once, moved to the device once, scaled once for all coders that share them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from components.activations.dataset.manifest import Manifest, require_manifest
from components.activations.dataset.reader import ActivationReader
from components.activations.dataset.source import Source
from components.activations.online.folder import OnlineFolder
from components.activations.online.reader import GenerationReader
from components.sae.coder import Column
from components.sae.mesh import Mesh
from components.training.job import Training


@dataclass(frozen=True)
class Statistics:
    """Of a column of a dataset: its width, the scale that makes the mean of `||x||^2` equal to it, its mean `[width]`."""

    column: Column
    scale: float
    mean: tuple[float, ...]


def statistics(manifest: Manifest, names: Sequence[str]) -> list[Statistics]:
    found = [manifest.column(name) for name in names]
    return [Statistics(Column(column.hook_point, column.d_in), column.scale, column.mean) for column in found]


def training_manifest(job: Training, should_stop: Callable[[], bool] = lambda: False, leads: bool = True) -> Manifest:
    """Of what a job is trained on; of generations the first one's, which is waited for."""
    if not job.online:
        return require_manifest(job.dataset_url)
    folder = OnlineFolder(job.dataset_url)
    folder.waited_for(folder.first_manifest, should_stop, leads)
    manifest = folder.first_manifest()
    assert manifest is not None
    return manifest


def open_source(
    job: Training,
    columns: Sequence[str],
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> ActivationReader | GenerationReader:
    """What a job is trained on. should_stop: asked while a generation is waited for."""
    leads = mesh is None or mesh.leads
    manifest, cache = training_manifest(job, should_stop, leads), None if job.cache is None else job.cache.open()
    if job.online:
        return GenerationReader(
            folder=OnlineFolder(job.dataset_url), manifest=manifest, columns=tuple(columns),
            batch_size=job.settings.batch_size, parts=job.settings.gradient_accumulation_steps, seed=job.seed, device=device,
            cache=cache, leads=leads, should_stop=should_stop,
        )  # fmt: skip
    return ActivationReader(
        url=job.dataset_url, manifest=manifest, columns=tuple(columns), batch_size=job.settings.batch_size,
        parts=job.settings.gradient_accumulation_steps, seed=job.seed, device=device, cache=cache,
    )  # fmt: skip


def scaled_mean(columns: Sequence[Statistics], device: torch.device) -> Tensor:
    """`[width of all columns]`"""
    return torch.cat([torch.tensor(column.mean, device=device) * column.scale for column in columns])


def scaled_batches(
    reader: Source,
    columns: Sequence[Statistics],
    start: int,
    device: torch.device,
    mesh: Mesh | None = None,
) -> Generator[dict[str, Tensor]]:
    """Batches from row `start` on, without end: each column `[batch, width]` in float32, times its scale. mesh: each process
    gets its share of every batch."""
    rank, ranks = (0, 1) if mesh is None else (mesh.data_rank, mesh.data)
    with closing(reader.batches(start, rank, ranks)) as batches:
        # Generations are not read ahead: what the next one waits for may be given back by the step in between.
        ahead = device.type == "cuda" and isinstance(reader, ActivationReader)
        for batch in _a_batch_ahead(batches, device) if ahead else batches:
            yield {
                column.column.name: batch[column.column.name].to(device, non_blocking=True).float() * column.scale
                for column in columns
            }


def _a_batch_ahead(batches: Iterator[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches on a GPU, the next of which is copied there while it computes with the one before."""
    side, held = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(side):
            there = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        if held is not None:
            yield _arrived(held[1], side)
        # Memory of the host may be written again once nobody holds it, and one waits for no other stream then.
        held = batch, there
    if held is not None:
        yield _arrived(held[1], side)


def _arrived(batch: dict[str, Tensor], side: torch.cuda.Stream) -> dict[str, Tensor]:
    current = torch.cuda.current_stream(side.device)
    current.wait_stream(side)
    for values in batch.values():
        values.record_stream(current)
    return batch


def side_by_side(batch: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """Some columns of a batch as one, `[batch, width of all]`."""
    return batch[names[0]] if len(names) == 1 else torch.cat([batch[name] for name in names], dim=1)
