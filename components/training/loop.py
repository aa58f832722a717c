"""The training loop: an activation dataset in, an SAE artifact out.

Killed at any moment and called again, it continues from the last checkpoint and ends with the same weights, bit for
bit on the same device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from components import storage
from components.activations.dataset.manifest import Column, Manifest
from components.activations.dataset.reader import ActivationReader
from components.hardware import keep_freed_memory
from components.progress import progress
from components.run.code_version import code_versions
from components.sae.artifact import WEIGHTS_NAME, sae_files
from components.sae.relu import ReLUSAE, relu_loss
from components.sae.settings import SAESettings
from components.settings import digest
from components.storage.cache import CachePlace
from components.training.checkpoint import (
    Point,
    TrainingState,
    checkpoint_folder,
    restore_checkpoint,
    save_checkpoint,
)
from components.training.schedule import learning_rate, sparsity_coefficient
from components.training.settings import TrainingSettings

# Raised when the same settings and data would no longer give the same weights.
RECIPE_VERSION = 2

logger = logging.getLogger(__name__)


def training_identity(
    settings: TrainingSettings, sae: SAESettings, dataset_digest: str, hook_point: str, seed: int
) -> dict[str, Any]:
    """Everything that decides the weights (on one kind of device)."""
    unimportant = {"hook_point", "checkpoint_tokens", "log_tokens"}
    return {
        "kind": "sae",
        "recipe_version": RECIPE_VERSION,
        "dataset": dataset_digest,
        "hook_point": hook_point,
        "seed": seed,
        "sae": sae.model_dump(mode="json"),
        "training": settings.model_dump(mode="json", exclude=unimportant),
    }


@dataclass(frozen=True, kw_only=True)
class Training:
    """One SAE's training: where the data is, where the artifact goes, and how."""

    url: str
    identity: dict[str, Any]
    settings: TrainingSettings
    sae: SAESettings
    dataset_url: str
    manifest: Manifest
    hook_point: str
    seed: int
    metadata: dict[str, Any]
    """What SAELens shows beside the SAE."""
    cache: CachePlace | None = None
    """Where what is read from an object store is kept."""

    @property
    def steps(self) -> int:
        return -(-self.settings.tokens // self.settings.batch_size)


def read_training_record(url: str) -> dict[str, Any] | None:
    """The record of a finished training (`training.json`, put last), None where there is none."""
    return storage.read_json_if_present(storage.join(url, "training.json"))


class Stopped(Exception):
    """Training was asked to stop, and has left a checkpoint."""


def train(
    work: Training,
    device: torch.device,
    on_points: Callable[[list[Point]], None] = lambda points: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, or continue, or return what is there: the record of the finished training.

    on_points: gets the training curves' points, once each, as they come; after a resume from the first on again.
    should_stop: asked after every step; once it says yes, a checkpoint is put and `Stopped` is raised.
    """
    record = read_training_record(work.url)
    if record is None:
        with storage.exclusive(work.url):
            record = read_training_record(work.url) or _train(work, device, on_points, should_stop)
    else:
        on_points(record["curves"])
    storage.delete(checkpoint_folder(work.url))
    storage.sweep(work.url)
    return record


def _train(
    work: Training, device: torch.device, on_points: Callable[[list[Point]], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    keep_freed_memory()
    settings, column = work.settings, work.manifest.column(work.hook_point)
    state = _initial_state(work, column, device)
    if restore_checkpoint(state, work.url):
        logger.info("train: continuing from step %s of %s", f"{state.step:,}", f"{work.steps:,}")
        on_points(state.curves)
    reader = ActivationReader(
        url=work.dataset_url,
        manifest=work.manifest,
        columns=(work.hook_point,),
        batch_size=settings.batch_size,
        seed=work.seed,
        pin_memory=device.type == "cuda",
        cache=None if work.cache is None else work.cache.open(),
    )
    checkpoint_steps = max(1, settings.checkpoint_tokens // settings.batch_size)
    log_steps = max(1, settings.log_tokens // settings.batch_size)
    mean = torch.tensor(column.mean, device=device) * column.scale
    started, started_step = time.monotonic(), state.step
    total = (work.steps - state.step) * settings.batch_size
    with (
        closing(reader.batches(state.step * settings.batch_size)) as batches,
        progress(logger, "train", total, "tokens") as advance,
    ):
        for step in range(state.step, work.steps):
            x = next(batches)[work.hook_point].to(device, non_blocking=True).float() * column.scale
            measured = (step + 1) % log_steps == 0 or step + 1 == work.steps
            point = _step(state, settings, x, mean, step, work.steps, measured)
            state.step = step + 1
            note = ""
            if point is not None:
                state.curves.append(point)
                on_points([point])
                note = f"loss {point['loss']:.2f}, l0 {point['l0']:.1f}, dead {point['dead_fraction']:.3f}"
            advance(settings.batch_size, note)
            stop = should_stop()
            if state.step < work.steps and (stop or state.step % checkpoint_steps == 0):
                save_checkpoint(state, work.url)
                if stop:
                    raise Stopped(f"stopped after step {state.step:,} of {work.steps:,}, at a checkpoint")
    return _finish(work, state, column, device, time.monotonic() - started, work.steps - started_step)


def _initial_state(work: Training, column: Column, device: torch.device) -> TrainingState:
    sae = ReLUSAE(column.d_in, work.sae.features(column.d_in))
    sae.initialise(work.sae.decoder_init_norm, work.seed)
    sae.to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, betas=work.settings.adam_betas, fused=True)
    silent = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    return TrainingState(sae=sae, optimizer=optimizer, silent_tokens=silent, step=0, curves=[])


def _step(
    state: TrainingState, settings: TrainingSettings, x: Tensor, mean: Tensor, step: int, steps: int, measured: bool
) -> Point | None:
    """One optimizer step on scaled activations `[batch, d_in]`; a point of the curves where one is `measured`."""
    coefficient = sparsity_coefficient(settings, step, steps)
    rate = learning_rate(settings, step, steps)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bfloat16"):
        terms = relu_loss(state.sae, x, coefficient)
    terms.total.backward()
    gradient_norm = torch.nn.utils.clip_grad_norm_(state.sae.parameters(), settings.clip_gradient_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    fired = terms.features.amax(dim=0) > 0
    state.silent_tokens += len(x)
    state.silent_tokens.masked_fill_(fired, 0)
    if not measured:
        return None
    variance = (x - mean).square().sum(dim=1).mean()
    point = {
        "tokens": float((step + 1) * settings.batch_size),
        "loss": terms.total.item(),
        "reconstruction_loss": terms.reconstruction.item(),
        "sparsity_loss": terms.sparsity.item(),
        "explained_variance": 1.0 - (terms.reconstruction / variance).item(),
        "l0": (terms.features > 0).sum(dim=1).float().mean().item(),
        "dead_fraction": (state.silent_tokens >= settings.dead_after_tokens).float().mean().item(),
        "gradient_norm": gradient_norm.item(),
        "learning_rate": rate,
        "sparsity_coefficient": coefficient,
    }
    if not all(map(_finite, point.values())):
        raise FloatingPointError(
            f"training diverged at step {step + 1}: loss {point['loss']}, gradient norm {point['gradient_norm']}; "
            "lower training.learning_rate"
        )
    return point


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _finish(
    work: Training, state: TrainingState, column: Column, device: torch.device, seconds: float, steps: int
) -> dict[str, Any]:
    """Put the artifact's files and then the record, whose presence says that the artifact is whole."""
    files = sae_files(state.sae.cpu().folded(column.scale), work.metadata)
    for name, content in files.items():
        storage.put_bytes(content, storage.join(work.url, name))
    record = {
        "digest": digest(work.identity),
        "identity": work.identity,
        "d_in": state.sae.d_in,
        "d_sae": state.sae.d_sae,
        "activation_scale": column.scale,
        "weights_sha256": sha256(files[WEIGHTS_NAME]).hexdigest(),
        "steps": work.steps,
        "tokens": work.steps * work.settings.batch_size,
        "device": str(device),
        "tokens_per_second": steps * work.settings.batch_size / seconds if steps else None,
        "code": {name: code_versions()[name] for name in ("sae", "training")},
        "curves": state.curves,
    }
    storage.put_json(record, storage.join(work.url, "training.json"))
    return record
