"""Learning rate and sparsity coefficient as functions of the step alone: nothing to save, nothing to get out of step."""

from __future__ import annotations

from components.training.settings import TrainingSettings


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """At the start of 0-based `step` of `steps`: linear warmup, constant, linear to zero over the last share."""
    return (
        settings.learning_rate
        * _rise(step, steps, settings.learning_rate_warmup)
        * _fall(step, steps, settings.learning_rate_decay)
    )


def sparsity_coefficient(settings: TrainingSettings, step: int, steps: int) -> float:
    """Lambda at 0-based `step` of `steps`: linear from zero over the first share, then constant."""
    return settings.sparsity_coefficient * _rise(step, steps, settings.sparsity_warmup)


def _rise(step: int, steps: int, share: float) -> float:
    length = share * steps
    return min(1.0, step / length) if length > 0 else 1.0


def _fall(step: int, steps: int, share: float) -> float:
    length = share * steps
    return min(1.0, (steps - step) / length) if length > 0 else 1.0
