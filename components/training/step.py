"""One coder in training, and its optimizer step on a batch that it may share with others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.sae.architectures import architectures
from components.sae.coder import Coder, Column, Progress
from components.sae.kernels.asked import Asked
from components.sae.kernels.sparse import can_be_sparse_on_gpu
from components.sae.mesh import Mesh
from components.training.job import Point, Training
from components.training.optimizer import update
from components.training.parallel.gradients import averaged, gradient_norm
from components.training.resampling import is_due, resample
from components.training.schedule import learning_rate
from components.training.settings import TrainingSettings

EXPLODED = 1e9
"""A reconstruction error of so many times the activations' own mean square is no training any more."""


@dataclass
class CoderInTraining:
    """What training changes from step to step."""

    coder: Coder
    optimizer: torch.optim.Adam
    silent_tokens: Tensor
    """Per feature, int64 `[d_sae]`: tokens since it last fired."""
    diverged_at: Tensor
    """Number of the first step whose loss or gradient was not finite, int64 `[]`; 0 while there was none."""
    seed: int = 0
    step: int = 0
    """Steps taken."""
    curves: list[Point] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name: parameters and buffers, Adam's moments, counters."""
        found = {"silent_tokens": self.silent_tokens}
        found |= {f"weight.{name}": value for name, value in self.coder.state_dict().items()}
        for name, parameter in self.coder.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"adam.{key}.{name}"] = value
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int, curves: list[Point]) -> None:
        """Bring it to the state that `tensors` was taken from."""
        prefix = "weight."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        self.coder.load_state_dict(weights)
        for name, parameter in self.coder.named_parameters():
            # Fused Adam keeps `step` on the device too, and reads all of its state in the order of the parameter's memory.
            state = {"step": tensors[f"adam.step.{name}"].to(parameter.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.empty_like(parameter).copy_(tensors[f"adam.{key}.{name}"])
            self.optimizer.state[parameter] = state
        self.silent_tokens.copy_(tensors["silent_tokens"])
        self.step, self.curves = step, curves

    def dead(self, settings: TrainingSettings) -> Tensor:
        """Which features have been silent for so long that they count as dead, `[d_sae]`."""
        return self.silent_tokens >= settings.dead_after

    def require_finite(self) -> None:
        """A FloatingPointError that names the step in which training diverged, if it did. Waits for the device."""
        step = int(self.diverged_at.item())
        if step:
            raise FloatingPointError(
                f"training diverged at step {step:,}: its loss or gradient is not finite or beyond all bounds, and no "
                "weight was changed by it; lower training.learning_rate"
            )


def new_coder(
    job: Training, reads: tuple[Column, ...], writes: tuple[Column, ...], device: torch.device, mesh: Mesh | None = None
) -> CoderInTraining:
    """The coder of a job with its first weights; in a mesh, this process's share of its features."""
    d_sae = job.coder.features(sum(column.width for column in reads)) // (1 if mesh is None else mesh.features)
    coder = architectures()[job.coder.architecture](job.coder, reads, writes, d_sae)
    coder.mesh = mesh
    coder.initialise(job.seed)
    coder.to(device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=0.0, betas=job.settings.adam_betas, fused=True)
    silent, diverged = torch.zeros(d_sae, dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    return CoderInTraining(coder, optimizer, silent, diverged, job.seed)


@dataclass(frozen=True)
class BatchLosses:
    """Of a whole batch, detached: means over its micro-batches."""

    total: Tensor
    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]
    fired: Tensor
    """Which features did, bool `[d_sae]`."""
    l0: Tensor | None
    """Where it was asked for."""


def backward(
    coder: Coder, settings: TrainingSettings, x: Tensor, y: Tensor, progress: Progress, measured: bool = False
) -> BatchLosses:
    """The loss of a batch, x `[n, d_in]` and y `[n, d_out]`, in `gradient_accumulation_steps` equal parts, and its gradient in
    the parameters' `grad`. measured: with `l0`."""
    parts: list[BatchLosses] = []
    count = settings.gradient_accumulation_steps
    size = len(x) // count
    for some, written in zip(x.split(size), y.split(size), strict=True):
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bfloat16"):
            losses = coder.losses(some, written, progress)
        total = losses.total
        (total if count == 1 else total / count).backward()
        parts.append(
            BatchLosses(
                total=total.detach(),
                terms={name: term.detach() for name, term in losses.terms.items()},
                weights=losses.weights,
                fired=losses.features.largest() > 0,
                l0=losses.features.active().float().mean() if measured else None,
            )
        )
        del losses, total  # what the next part needs
    return parts[0] if len(parts) == 1 else _together(parts)


def _together(parts: list[BatchLosses]) -> BatchLosses:
    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(dim=0)

    first, l0 = parts[0], [part.l0 for part in parts if part.l0 is not None]
    return BatchLosses(
        total=mean([part.total for part in parts]),
        terms={name: mean([part.terms[name] for part in parts]) for name in first.terms},
        weights={name: sum(part.weights[name] for part in parts) / len(parts) for name in first.weights},
        fired=torch.stack([part.fired for part in parts]).any(dim=0),
        l0=mean(l0) if l0 else None,
    )


def take_step(
    training: CoderInTraining, settings: TrainingSettings, x: Tensor, y: Tensor, mean: Tensor, measured: bool
) -> Point | None:
    """One optimizer step on scaled activations, x `[n, d_in]` and y `[n, d_out]`; a point of the curves where it is `measured`.

    mean `[d_out]`: of what is written, scaled. A step whose loss or gradient is not finite changes no weight: the optimizer is
    told so on the device, without waiting for it.
    """
    coder, optimizer = training.coder, training.optimizer
    dead = training.dead(settings)
    progress = Progress(training.step, settings.steps, dead, Asked(dead) if can_be_sparse_on_gpu(x, coder.d_sae) else None)
    losses = backward(coder, settings, x, y, progress, measured)
    watched = torch.stack([losses.total, losses.terms["reconstruction"]])
    (total, reconstruction), norm = gradient_norm(coder, watched)
    bad = ~(total.isfinite() & norm.isfinite() & (reconstruction < EXPLODED * coder.d_out))
    training.diverged_at.copy_(torch.where(bad & (training.diverged_at == 0), training.step + 1, training.diverged_at))
    rate = learning_rate(settings, progress)
    update(optimizer, rate, norm, settings.clip_gradient_norm, training.diverged_at > 0, settings.autocast == "bfloat16")
    coder.after_step()
    fired = losses.fired
    training.silent_tokens += len(x) if coder.mesh is None else len(x) * coder.mesh.data
    training.silent_tokens.masked_fill_(fired if coder.mesh is None else coder.mesh.any(fired), 0)
    training.step += 1
    if is_due(coder, training.step, settings.steps):
        dead = training.dead(settings)
        resample(coder, optimizer, dead, x, y, training.seed, training.step)
        training.silent_tokens.masked_fill_(dead, 0)
    if measured or x.device.type == "cpu":  # where the device is the CPU, asking waits for nothing
        training.require_finite()
    if losses.l0 is None:
        return None
    point = _point(training, settings, losses, losses.l0, total, y, mean)
    point |= {"gradient_norm": norm.item(), "learning_rate": rate}
    training.curves.append(point)
    return point


def _point(
    training: CoderInTraining, settings: TrainingSettings, losses: BatchLosses, l0: Tensor, total: Tensor, y: Tensor,
    mean: Tensor,
) -> Point:  # fmt: skip
    shares = {
        "variance": (y - mean).square().sum(dim=1).mean(),
        "l0": l0,
        "dead_fraction": training.dead(settings).float().mean(),
    }
    found = averaged(shares | dict(losses.terms), ("l0",), training.coder.mesh)
    variance, reconstruction = found["variance"], found["reconstruction"]
    point = {
        "tokens": float(training.step * settings.batch_size),
        "loss": total.item(),
        **{f"{name}_loss": found[name] for name in losses.terms},
        **{f"{name}_coefficient": weight for name, weight in losses.weights.items() if name != "reconstruction"},
        "explained_variance": 1.0 - reconstruction / variance if variance > 0 else 0.0,
        "l0": found["l0"],
        "dead_fraction": found["dead_fraction"],
    }
    return {name: value for name, value in point.items() if math.isfinite(value)}
