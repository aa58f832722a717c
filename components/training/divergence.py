"""What is kept of a training that diverged: its state, and the batch by which it did, so that the step can be run again."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from components import storage
from components.activations.dataset.source import Source
from components.sae.coder import Progress
from components.settings import UserError
from components.training.batches import scaled_batches, side_by_side, statistics, training_manifest
from components.training.checkpoint import CheckpointWriter, newest_checkpoint, restore_checkpoint
from components.training.job import Training
from components.training.step import CoderInTraining, backward, new_coder

_BATCH = "batch.safetensors"


def divergence_folder(url: str) -> str:
    return storage.join(url, "diverged")


def keep_divergence(job: Training, training: CoderInTraining, reader: Source, error: FloatingPointError) -> FloatingPointError:
    """Put the batch of the step and the state that it met; the error, with where they are and the last good checkpoint.

    The batch is read again: where the device is a GPU, a step is known to have diverged only after some more.
    """
    folder, mesh, step = divergence_folder(job.url), training.coder.mesh, int(training.diverged_at.item())
    if mesh is None or mesh.leads:
        storage.delete(folder)
        names = tuple(dict.fromkeys((*job.reads, *job.writes)))
        columns = statistics(reader.manifest, names)
        with closing(scaled_batches(reader, columns, (step - 1) * job.settings.batch_size, torch.device("cpu"))) as batches:
            batch = {name: values.contiguous() for name, values in next(batches).items()}
        with storage.whole_file(storage.join(folder, _BATCH)) as path:
            save_file(batch, path, metadata={"state": json.dumps({"step": step})})
    if mesh is not None:
        mesh.meet()
    writer = CheckpointWriter(folder, lambda: None)
    writer.save(training)
    writer.wait()
    if mesh is not None:
        mesh.meet()  # who ended now would take the others along
    good = newest_checkpoint(job.url)
    where = "there is no checkpoint before it" if good is None else f"the last good checkpoint is that of step {good:,}"
    return FloatingPointError(f"{error}; {where}, and `sae train CONFIG --replay` runs the batch again, kept in '{folder}'")


@dataclass(frozen=True)
class Replay:
    """A step that was run again, and not taken."""

    step: int
    terms: dict[str, float]
    """Of the loss, each with its weight."""
    gradients: dict[str, float]
    """Norm of each parameter's gradient."""
    weights: dict[str, float]
    """Largest entry of each parameter, without its sign; NaN where one is."""
    batch: dict[str, float]
    """The same of each column, scaled."""
    not_finite: list[str]
    """What of all this is none of finite numbers."""
    rows: list[int]
    """Tokens of the batch, at most 10, that have the largest entries; those with none that is finite first."""

    def as_json(self) -> dict[str, Any]:
        """JSON has no NaN: what is not finite is a text."""
        tree = asdict(self)
        for part in ("terms", "gradients", "weights", "batch"):
            tree[part] = {name: value if _finite(value) else str(value) for name, value in tree[part].items()}
        return tree


def replay(job: Training, device: torch.device) -> Replay:
    """Run the step again by which a training diverged; a UserError where none has."""
    folder = divergence_folder(job.url)
    if not storage.exists(storage.join(folder, _BATCH)):
        raise UserError(f"--replay: no step of this training has diverged; there is no batch in '{folder}'")
    with storage.local_copy(storage.join(folder, _BATCH)) as path:
        with safe_open(path, framework="pt") as file:
            step = json.loads(file.metadata()["state"])["step"]
        batch = {name: values.to(device) for name, values in load_file(path).items()}
    manifest = training_manifest(job)
    reads, writes = ([column.column for column in statistics(manifest, names)] for names in (job.reads, job.writes))
    training = new_coder(job, tuple(reads), tuple(writes), device)
    restore_checkpoint(training, folder)
    x, y = side_by_side(batch, job.reads), side_by_side(batch, job.writes)
    progress = Progress(step - 1, job.steps, training.dead(job.settings))
    losses = backward(training.coder, job.settings, x, y, progress)
    found = Replay(
        step=step,
        terms={name: losses.weights.get(name, 0.0) * term.item() for name, term in losses.terms.items()},
        gradients={
            name: parameter.grad.norm().item()
            for name, parameter in training.coder.named_parameters()
            if parameter.grad is not None
        },
        weights={name: _largest(parameter) for name, parameter in training.coder.named_parameters()},
        batch={name: _largest(values) for name, values in batch.items()},
        not_finite=[],
        rows=_worst(x),
    )
    parts = {
        "term": found.terms, "gradient of": found.gradients, "weight": found.weights, "column": found.batch
    }  # fmt: skip
    named = [f"{kind} {name}" for kind, values in parts.items() for name, value in values.items() if not _finite(value)]
    return replace(found, not_finite=named)


def _largest(values: Tensor) -> float:
    return values.detach().abs().max().item()


def _finite(value: float) -> bool:
    return value - value == 0.0


def _worst(x: Tensor) -> list[int]:
    largest = torch.nan_to_num(x.abs().amax(dim=1), nan=torch.inf)
    return largest.topk(min(10, len(largest))).indices.tolist()
