"""Batches on their way to coders: read once, moved to the device once, scaled once for all coders that share them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from components.activations.dataset.manifest import Manifest
from components.activations.dataset.reader import ActivationReader
from components.sae.coder import Column
from components.sae.mesh import Mesh


@dataclass(frozen=True)
class Statistics:
    """Of a column of a dataset: its width, the scale that makes the mean of `||x||^2` equal to it, its mean `[width]`."""

    column: Column
    scale: float
    mean: tuple[float, ...]


def statistics(manifest: Manifest, names: Sequence[str]) -> list[Statistics]:
    found = [manifest.column(name) for name in names]
    return [Statistics(Column(column.hook_point, column.d_in), column.scale, column.mean) for column in found]


def scaled_mean(columns: Sequence[Statistics], device: torch.device) -> Tensor:
    """`[width of all columns]`"""
    return torch.cat([torch.tensor(column.mean, device=device) * column.scale for column in columns])


def scaled_batches(
    reader: ActivationReader,
    columns: Sequence[Statistics],
    start: int,
    device: torch.device,
    mesh: Mesh | None = None,
) -> Generator[dict[str, Tensor]]:
    """Batches from row `start` on, without end: each column `[batch, width]` in float32, times its scale. mesh: each process
    gets its share of every batch."""
    rank, ranks = (0, 1) if mesh is None else (mesh.data_rank, mesh.data)
    with closing(reader.batches(start, rank, ranks)) as batches:
        for batch in batches:
            yield {
                column.column.name: batch[column.column.name].to(device, non_blocking=True).float() * column.scale
                for column in columns
            }


def side_by_side(batch: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """Some columns of a batch as one, `[batch, width of all]`."""
    return batch[names[0]] if len(names) == 1 else torch.cat([batch[name] for name in names], dim=1)
