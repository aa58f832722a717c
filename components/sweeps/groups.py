"""Which children are trained in lockstep: those that read the same batches, as many as fit into memory together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from components.run.estimate import training_memory
from components.sweeps.grid import Child

_USABLE = 0.6
"""Share of what is free: estimates leave out the allocator's rounding, and others use the machine as well."""


@dataclass(frozen=True)
class Groups:
    groups: list[list[Child]]
    too_large: list[tuple[Child, str]]
    """Children that do not fit alone, each with the reason."""


def lockstep_groups(children: Sequence[Child], stored: int, memory_bytes: int, workers: int = 1) -> Groups:
    """stored: tokens of the dataset. memory_bytes: that a group may take, by the estimate of `sae plan`. workers: that train
    groups at the same time, and each should have one."""
    most = -(-len(children) // workers)
    groups: list[list[Child]] = []
    too_large: list[tuple[Child, str]] = []
    # those of a length end together, so that few steps are taken by few
    ordered = sorted(children, key=lambda child: (_batches(child), -child.run.config.training.steps))
    for _, sharing in groupby(ordered, _batches):
        free, group = 0, list[Child]()
        for child in sharing:
            coder, window = training_memory(child.run, stored)
            if coder + window > memory_bytes:
                too_large.append((child, _sentence(child, coder + window, memory_bytes)))
                continue
            if not group or coder > free or len(group) == most:
                group, free = [], memory_bytes - window
                groups.append(group)
            group.append(child)
            free -= coder
    return Groups(groups, too_large)


def _batches(child: Child) -> tuple[int, tuple[str, ...], tuple[str, ...], int]:
    """What decides the batches that it reads: children of a sweep share dataset and seed anyhow."""
    run = child.run
    return run.config.training.batch_size, run.reads, run.writes, run.config.seed


def _sentence(child: Child, needed: int, memory_bytes: int) -> str:
    return (
        f"its training would take {needed / 1e9:.3g} GB of memory, of {memory_bytes / 1e9:.3g} GB that may be used: "
        f"make sae.d_sae ({child.run.d_sae:,}) or training.batch_size smaller"
    )


def usable_memory(device: torch.device) -> int:
    """Bytes that trainings may take together on this device, of those that are free now."""
    if device.type == "cuda":
        return int(_USABLE * torch.cuda.mem_get_info(device)[0])
    import psutil

    free = psutil.virtual_memory().available
    try:  # a container's limit is not the machine's
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return int(_USABLE * free)
