"""The processes of a parallel training, as torchrun (torch.distributed.elastic) starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from components import storage
from components.sae.architectures import architectures
from components.sae.mesh import Mesh
from components.sae.settings import CoderSettings
from components.settings import UserError
from components.storage.locks import Claim
from components.training.settings import RankSettings, TrainingSettings

LONGEST_WAIT = timedelta(hours=1)
"""For another process in the middle of training; one that has ended is noticed at once."""
_POLL_SECONDS = 0.2


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return dist.is_torchelastic_launched()


def speaks() -> bool:
    """Whether this process is alone, or the one of them that speaks for all."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def require_parallel(ranks: RankSettings, training: TrainingSettings, coder: CoderSettings, d_sae: int) -> None:
    """A UserError where this training cannot be shared out so."""
    if ranks.size == 1:
        return
    if not architectures()[coder.architecture].parallel:
        raise UserError(f"execution.training: '{coder.architecture}' exchanges nothing with other processes; accepted is one")
    if coder.resample_at:
        raise UserError(
            "sae.resample_at: accepted with one process, and execution.training asks for more; AuxK works with any number"
        )
    parts = training.gradient_accumulation_steps
    if training.batch_size % (ranks.data_parallel * parts):
        of_parts = "" if parts == 1 else f", each in {parts} parts (training.gradient_accumulation_steps)"
        raise UserError(
            f"execution.training.data_parallel: a batch of {training.batch_size} tokens (training.batch_size) has no equal "
            f"shares for {ranks.data_parallel} processes{of_parts}"
        )
    if d_sae % ranks.feature_parallel:
        raise UserError(
            f"execution.training.feature_parallel: {d_sae} features have no equal shares for {ranks.feature_parallel} processes"
        )


@contextmanager
def joined(ranks: RankSettings, device: torch.device) -> Iterator[tuple[Mesh, torch.device]]:
    """The mesh of all processes that torchrun started, and this one's device; a UserError where they are not as many."""
    started = int(os.environ["WORLD_SIZE"])
    if started != ranks.size:
        raise UserError(
            f"execution.training: data_parallel {ranks.data_parallel} times feature_parallel {ranks.feature_parallel} are "
            f"{ranks.size} processes, and torchrun started {started}"
        )
    if device.type == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"execution.training: {here} processes on this machine want a GPU each, and it has {gpus}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    yield Mesh.joined(ranks.data_parallel, ranks.feature_parallel, device), device
    # Not after an error: NCCL would wait here for processes that wait in an exchange for this one. It ends, and they are ended.
    dist.destroy_process_group()


@contextmanager
def claimed(url: str, mesh: Mesh | None) -> Iterator[Claim]:
    """`storage.claimed` for all processes of a mesh: the first claims, and the others wait for it, however long it takes."""
    if mesh is None:
        with storage.claimed(url) as claim:
            yield claim
        return
    store, key = dist.distributed_c10d._get_default_store(), f"claimed:{url}"
    if mesh.leads:
        with storage.claimed(url) as claim:
            store.set(key, "")
            yield claim
        return
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
    yield Claim()
