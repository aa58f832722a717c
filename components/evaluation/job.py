"""What there is to do for one evaluation, and the spans of text that it is cut into: any worker may measure any of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from components.activations.settings import ExcludeSettings
from components.corpus.tokens import read_sequences
from components.evaluation.held_out import HeldOut
from components.evaluation.settings import EvaluationSettings
from components.language_model.hook_points import HookPoint
from components.language_model.loading import ModelSource

_SEQUENCES_AT_ONCE = 1_024


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """All that a worker must know; it loads the language model and the SAE itself."""

    settings: EvaluationSettings
    exclude: ExcludeSettings
    source: ModelSource
    point: HookPoint
    reads: tuple[HookPoint, ...]
    """See `Subject`."""
    text: HeldOut
    sae_url: str
    kept_url: str
    """Where the sums of spans that are done lie (see `KeptSpans`)."""


@dataclass(frozen=True)
class Span:
    """Neighbouring held-out sequences; it may begin and end within a document."""

    sequences: range
    tokens: int
    """How many of their counted tokens are measured, the first ones."""


def batch_size(batch_sequences: int, variants: int) -> int:
    """Sequences that are read at once, each of which goes through the model as it is and in `variants` others."""
    return max(1, batch_sequences // (1 + variants))


def spans(text: HeldOut, tokens: int, batch: int, parts: int) -> list[Span]:
    """The first `tokens` held-out tokens in at most `parts` spans of about the same length.

    They are cut between batches of `batch` sequences. So every batch holds the same sequences however many spans there
    are, and what the model rounds does not depend on that number either.
    """
    whole = Span(range(text.manifest.splits["held_out"].sequences), tokens)
    if parts == 1:
        return [whole]
    counts, left = [np.zeros(1, dtype=np.int64)], tokens
    for start in whole.sequences[::_SEQUENCES_AT_ONCE]:
        stop = min(start + _SEQUENCES_AT_ONCE, whole.sequences.stop)
        counts.append((read_sequences(text.url, text.manifest, "held_out", start, stop).documents >= 0).sum(axis=1))
        left -= int(counts[-1].sum())
        if left <= 0:
            break
    before = np.concatenate(counts).cumsum()
    needed = min(int(np.searchsorted(before, tokens)), len(before) - 1)
    batches = -(-needed // batch)
    edges = [min(batches * part // parts * batch, needed) for part in range(parts + 1)]
    found = [
        Span(range(first, last), min(tokens, int(before[last])) - int(before[first]))
        for first, last in pairwise(edges)
        if first < last
    ]
    return found or [whole]
