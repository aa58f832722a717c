"""The learning rate as a function of the step alone: nothing to save, nothing to get out of step."""

from __future__ import annotations

from components.sae.coder import Progress
from components.training.settings import TrainingSettings


def learning_rate(settings: TrainingSettings, progress: Progress) -> float:
    """At the start of a step: linear warmup, constant, linear to zero over the last share."""
    return settings.learning_rate * progress.rise(settings.learning_rate_warmup) * progress.fall(settings.learning_rate_decay)
