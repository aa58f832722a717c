"""What there is to do for one interpretation, and the spans of text that it is cut into: any worker may look at any of them."""

from __future__ import annotations

from dataclasses import dataclass

from components.evaluation.held_out import HeldOut
from components.evaluation.job import Span
from components.interpretation.settings import InterpretationSettings
from components.language_model.hook_points import HookPoint
from components.language_model.loading import ModelSource


@dataclass(frozen=True, kw_only=True)
class InterpretationJob:
    """All that a worker must know; it loads the language model and the coder itself."""

    settings: InterpretationSettings
    source: ModelSource
    points: tuple[HookPoint, ...]
    """What the coder reads, side by side."""
    text: HeldOut
    sae_url: str
    kept_url: str
    """Where what was seen of spans lies (see `seen`)."""
    spans: tuple[Span, ...]
