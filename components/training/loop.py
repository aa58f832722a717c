"""The training loop: an activation dataset in, one artifact per coder out.

Batches go to every coder that is trained; points, checkpoints and the artifact are where a coder's training ends up. Killed
at any moment and called again, it continues from the last checkpoints and ends with the same weights, bit for bit on the same
device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch

from components import storage
from components.activations.dataset.source import Source
from components.activations.online.folder import WaitEnded
from components.hardware import keep_freed_memory
from components.progress import progress
from components.sae.mesh import Mesh
from components.training.abreast import Abreast
from components.training.artifact import put_artifact
from components.training.batches import open_source, scaled_batches, training_manifest
from components.training.checkpoint import Due, checkpoint_folder, newest_checkpoint, restore_checkpoint
from components.training.divergence import divergence_folder, keep_divergence
from components.training.job import Outcome, Point, Pruned, Training, TrainingRecord, read_training_record
from components.training.member import Member, member_of, step_of
from components.training.parallel.ranks import claimed
from components.training.step import new_coder
from components.training.throughput import Throughput, said

_WAITS = 0.05
"""From this share of a training's time on it is said that it waits for data."""

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Training was asked to stop; it says from which checkpoint it continues."""

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text)
        self.step = step


def train(
    job: Training,
    device: torch.device,
    on_points: Callable[[list[Point]], None] = lambda points: None,
    should_stop: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> TrainingRecord:
    """Train, or continue, or return what is there: the record of the finished training.

    on_points: gets the training curves' points, once each, as they come; after a resume from the first on again.
    should_stop: asked after every step; once it says yes, a checkpoint is put and `Stopped` is raised.
    mesh: of the processes that train it together, each of which calls this.
    """
    (outcome,) = train_together([job], device, lambda _, points: on_points(points), should_stop, mesh)
    if not isinstance(outcome, TrainingRecord):
        raise outcome
    return outcome


def train_together(
    jobs: Sequence[Training],
    device: torch.device,
    on_points: Callable[[int, list[Point]], bool | None] = lambda job, points: None,
    should_stop: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> list[Outcome]:
    """Several coders on one pass over the same batches, each as it would be alone; what each came to, in the order of `jobs`.

    One that diverges drops out, and the others go on. The jobs share dataset, batch size and seed. on_points: gets the place
    in `jobs` first; True gives that training up.
    """
    first = jobs[0]
    for job in jobs[1:]:
        shared = [(one.dataset_url, one.settings.batch_size, one.seed) for one in (first, job)]
        assert shared[0] == shared[1], f"coders that are trained together read the same batches: {shared}"
    outcomes: dict[int, Outcome] = {}
    with ExitStack() as claims:
        members = []
        for place, job in enumerate(jobs):
            record = read_training_record(job.url)
            if record is None:
                claim = claims.enter_context(claimed(job.url, mesh))
                record = read_training_record(job.url)  # of a rival, for whom the claim has waited
            if record is None:
                try:
                    training_manifest(job, should_stop, mesh is None or mesh.leads)
                except WaitEnded:
                    raise Stopped("stopped before there was anything to train on", 0) from None
                members.append(member_of(place, job, claim.check, device, mesh))
            else:
                on_points(place, record.curves)
                outcomes[place] = record
        if members:
            outcomes |= _train(members, device, on_points, should_stop)
    for place, job in enumerate(jobs):
        if isinstance(outcomes[place], TrainingRecord | Pruned) and (mesh is None or mesh.leads):
            storage.delete(divergence_folder(job.url))
            storage.delete(checkpoint_folder(job.url))
            storage.sweep(job.url)
    return [outcomes[place] for place in range(len(jobs))]


def _train(
    members: Sequence[Member],
    device: torch.device,
    on_points: Callable[[int, list[Point]], bool | None],
    should_stop: Callable[[], bool],
) -> dict[int, Outcome]:
    keep_freed_memory()
    job = members[0].job
    size = job.settings.batch_size
    columns = {column.column.name: column for member in members for column in (*member.reads, *member.writes)}
    mesh = members[0].training.coder.mesh
    started, going = time.monotonic(), list(members)
    speed = Throughput(device, job.settings.autocast == "bfloat16")

    def meanwhile() -> bool:
        # The generation that is waited for may itself wait until one is given back.
        reader.release(min(_durable(member) for member in going) * size)
        # Several processes that hear of a stop at different moments would not meet in what they exchange.
        return mesh is None and should_stop()

    reader = open_source(job, list(columns), device, meanwhile, mesh)
    outcomes: dict[int, Outcome] = {}
    for member in members:
        if member.training.curves:
            on_points(member.place, member.training.curves)
    begin, end = min(member.training.step for member in members), max(member.job.steps for member in members)
    due = Due(job.settings.checkpoint_minutes)
    try:
        with (
            closing(scaled_batches(reader, list(columns.values()), begin * size, device, mesh)) as batches,
            Abreast([member.training.coder for member in members], device) as abreast,
            progress(logger, "train", (end - begin) * size, "tokens") as advance,
        ):
            for member in [one for one in going if one.training.step == one.job.steps]:  # but for the artifact
                going.remove(member)
                outcomes[member.place] = _finished(member, device, 0.0, 0.0)
            for step in range(begin, end):
                asked, note = time.monotonic(), ""
                try:
                    batch = next(batches)
                except WaitEnded:
                    raise Stopped(_stopped(going), going[0].training.step) from None
                speed.waited += time.monotonic() - asked
                speed.tokens += size
                stepping = [one for one in going if one.training.step == step]
                for member, taken in zip(stepping, abreast.each(partial(step_of, batch=batch), stepping), strict=True):
                    try:
                        point = _take(member, taken, speed, on_points)
                    except FloatingPointError as error:
                        going.remove(member)
                        outcomes[member.place] = keep_divergence(member.job, member.training, reader, error)
                        continue
                    except Pruned as pruned:
                        going.remove(member)
                        outcomes[member.place] = pruned
                        continue
                    if point is not None:
                        note = said(point)
                    if member.training.step == member.job.steps:
                        going.remove(member)
                        outcomes[member.place] = _finished(member, device, time.monotonic() - started, speed.waited)
                advance(size, note)
                if not going:
                    break
                stop, save = should_stop(), due.now() or _lets_go(reader, going, (step + 1) * size)
                if mesh is not None:
                    stop, save = mesh.anywhere(stop, save)
                if stop:
                    raise Stopped(_stopped(going), going[0].training.step)
                if save:
                    due.begin()
                    for member in going:
                        _save(member)
    finally:
        for member in members:
            member.checkpoints.wait(member.job.settings.stop_seconds)
    return outcomes


def _lets_go(reader: Source, going: Sequence[Member], row: int) -> bool:
    """Give back what of the data no coder will ask for again, whatever happens: what lies before everybody's last checkpoint.
    Whether a checkpoint is wanted for that."""
    end, size = reader.behind(row), going[0].job.settings.batch_size
    if end is None:
        return False
    reader.release(min(_durable(member) for member in going) * size)
    return any(max(member.started_step, member.checkpoints.begun or 0) * size < end for member in going)


def _durable(member: Member) -> int:
    """The step from which the training would go on if it were killed now."""
    mesh, complete = member.training.coder.mesh, member.checkpoints.complete
    if complete is None:
        return 0
    return complete if mesh is None else newest_checkpoint(member.job.url) or 0  # that all shares have put


def _take(
    member: Member,
    taken: Callable[[], tuple[Point | None, torch.Tensor]],
    speed: Throughput,
    on_points: Callable[[int, list[Point]], bool | None],
) -> Point | None:
    """What of a coder's step is due: a point, with how fast it goes; a checkpoint. Raises `Pruned` where it is given up."""
    job, training = member.job, member.training
    point, x = taken()
    speed.took(training.coder, x)
    if point is not None:
        point = point | speed.since(member.place, (job.steps - training.step) * job.settings.batch_size)
    if point is not None and on_points(member.place, [point]) and training.step < job.steps:
        raise Pruned(f"given up after {point['tokens']:,.0f} of {job.steps * job.settings.batch_size:,} tokens")
    if training.step < job.steps and training.step % member.checkpoint_steps == 0:
        _save(member)
    return point


def _save(member: Member) -> None:
    """Begin a checkpoint of this step, unless that has been done."""
    if member.checkpoints.begun != member.training.step:
        member.training.require_finite()
        member.checkpoints.save(member.training)


def _finished(member: Member, device: torch.device, seconds: float, waited: float) -> TrainingRecord:
    job, training, mesh = member.job, member.training, member.training.coder.mesh
    training.require_finite()
    steps = job.steps - member.started_step
    rate, waiting = (steps * job.settings.batch_size / seconds, waited / seconds) if steps else (None, None)
    if waiting is not None and waiting > _WAITS and job.online:
        logger.warning(
            "train: %.0f%% of its time it waited for data, as extraction is slower than training; see "
            "execution.extraction_device, or store the activations",
            100 * waiting,
        )
    if mesh is not None:
        # The whole is put together from the shares' last checkpoint, in memory of the first process and of no device.
        _save(member)
    member.checkpoints.wait()
    if mesh is not None:
        mesh.meet()
        if mesh.leads:
            columns = tuple(column.column for column in member.reads), tuple(column.column for column in member.writes)
            training = new_coder(job, *columns, torch.device("cpu"))
            assert restore_checkpoint(training, job.url)
    record = None
    if mesh is None or mesh.leads:
        record = put_artifact(job, training, member.reads, member.writes, device, rate, waiting, member.still_owned)
    if mesh is not None:
        mesh.meet()
        record = read_training_record(job.url)
    assert record is not None
    return record


def _stopped(members: Sequence[Member]) -> str:
    """Put the last checkpoints, as far as the time suffices, and say from where training continues."""
    for member in members:
        _save(member)
    seconds, mesh = max(member.job.settings.stop_seconds for member in members), members[0].training.coder.mesh
    until = time.monotonic() + seconds
    for member in members:
        late = not member.checkpoints.wait(max(0.0, until - time.monotonic()))
        if mesh is not None:
            (late,) = mesh.anywhere(late)
        if late:
            complete = newest_checkpoint(member.job.url)
            where = "its start" if complete is None else f"step {complete:,}"
            return (
                f"stopped after step {member.training.step:,} of {member.job.steps:,}; its last checkpoint was not put within "
                f"{seconds:g} s, so training continues from {where}"
            )
    return f"stopped after step {members[0].training.step:,} of {members[0].job.steps:,}, at a checkpoint"
