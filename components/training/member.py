"""One of the coders that are trained together: what the loop knows of it, and its step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from components.sae.mesh import Mesh
from components.training.batches import Statistics, scaled_mean, side_by_side, statistics, training_manifest
from components.training.beginning import begin_from_data
from components.training.checkpoint import CheckpointWriter, discard_incomplete, restore_checkpoint
from components.training.job import Point, Training
from components.training.parallel.shares import take_share
from components.training.start import load_start
from components.training.step import CoderInTraining, new_coder, take_step

logger = logging.getLogger(__name__)


@dataclass
class Member:
    """One of the coders that are trained together."""

    place: int
    job: Training
    training: CoderInTraining
    reads: list[Statistics]
    writes: list[Statistics]
    mean: torch.Tensor
    checkpoints: CheckpointWriter
    still_owned: Callable[[], None]
    started_step: int
    checkpoint_steps: int
    log_steps: int


def member_of(place: int, job: Training, still_owned: Callable[[], None], device: torch.device, mesh: Mesh | None) -> Member:
    manifest = training_manifest(job)
    reads, writes = statistics(manifest, job.reads), statistics(manifest, job.writes)
    columns = tuple(column.column for column in reads), tuple(column.column for column in writes)
    training = new_coder(job, *columns, device, mesh)
    if restore_checkpoint(training, job.url):
        logger.info("train: continuing from step %s of %s", f"{training.step:,}", f"{job.steps:,}")
    elif job.start is not None:
        whole = training.coder if mesh is None else new_coder(job, *columns, torch.device("cpu")).coder
        load_start(whole, job.start, [column.scale for column in reads], [column.scale for column in writes])
        if mesh is not None:
            take_share(training.coder, whole)
        logger.info("train: starting from the coder whose weights have the SHA-256 %s", job.start.weights_sha256[:16])
    else:
        begin_from_data(training.coder, job, reads, writes)
    if mesh is None or mesh.leads:
        discard_incomplete(job.url)
    if mesh is not None:
        mesh.meet()  # nobody puts a file before that
    settings = job.settings
    return Member(
        place=place,
        job=job,
        training=training,
        reads=reads,
        writes=writes,
        mean=scaled_mean(writes, device),
        checkpoints=CheckpointWriter(job.url, still_owned, settings.checkpoints_kept),
        still_owned=still_owned,
        started_step=training.step,
        checkpoint_steps=max(1, settings.checkpoint_tokens // settings.batch_size),
        log_steps=max(1, settings.log_tokens // settings.batch_size),
    )


def step_of(member: Member, batch: dict[str, torch.Tensor]) -> tuple[Point | None, torch.Tensor]:
    """One step of one coder, maybe beside those of others: a point where it is due, and what was read `[n, d_in]`."""
    job, training = member.job, member.training
    following = training.step + 1
    measured = following % member.log_steps == 0 or following == job.steps
    x, y = side_by_side(batch, job.reads), side_by_side(batch, job.writes)
    return take_step(training, job.settings, x, y, member.mean, measured), x
