"""What the features did on a text or a span of it; spans that are done outlive an interruption, in files beside each other."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from components import storage
from components.evaluation.job import Span
from components.interpretation.activations import Batch
from components.interpretation.examples import Examples
from components.interpretation.settings import InterpretationSettings
from components.interpretation.together import TokenSample
from components.interpretation.token_shares import SAMPLED

logger = logging.getLogger(__name__)


class Seen:
    """Adds up batch after batch, and span after span, in their order."""

    def __init__(
        self,
        settings: InterpretationSettings,
        d_sae: int,
        length: int,
        device: torch.device,
        earlier: Seen | None = None,
    ) -> None:
        """earlier: of all the text before, where it is known: what would be dropped beside that is not kept at all."""
        self.examples = Examples(settings.examples, settings.drawn, d_sae, length, device, sampled=SAMPLED)
        self.together = TokenSample(d_sae)
        self.tokens = self.sequences = 0
        if earlier is not None:
            self.examples.continue_after(earlier.examples)
            self.together.continue_after(earlier.together)

    def add(self, batch: Batch) -> None:
        found = batch.firings()
        self.examples.add(found, batch.first, len(batch.block))
        self.together.add(found)
        self.tokens += int(batch.counted.sum())
        self.sequences += len(batch.block)

    def include(self, content: bytes) -> None:
        """What `packed` gave of the next span; a ValueError, KeyError or BadZipFile where it is no such thing."""
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = dict(stored)
        tokens, sequences = (int(number) for number in arrays["seen"])
        self.examples.restore(arrays)
        self.together.restore(arrays)
        self.tokens, self.sequences = self.tokens + tokens, self.sequences + sequences

    def packed(self) -> bytes:
        """Plain arrays, from which nothing can be run."""
        with io.BytesIO() as stream:
            arrays: dict[str, Any] = {**self.examples.arrays(), **self.together.arrays()}
            np.savez(stream, seen=np.array([self.tokens, self.sequences]), **arrays)
            return stream.getvalue()


def keep_span(url: str, span: Span, look: Callable[[], Seen]) -> None:
    """Have the span's file under `url`, unless an earlier attempt left it."""
    if not storage.exists(address := _address(url, span)):
        storage.put_bytes(look().packed(), address)


def include_span(url: str, span: Span, seen: Seen, look: Callable[[], Seen]) -> None:
    """Add the span that was kept; one that is damaged or missing is looked at again."""
    keep_span(url, span, look)
    try:
        seen.include(storage.read_bytes(_address(url, span)))
    except (ValueError, KeyError, zipfile.BadZipFile):
        logger.warning("%s is damaged, and looked at again", _address(url, span))
        seen.include(look().packed())


def _address(url: str, span: Span) -> str:
    return storage.join(url, f"features-{span.sequences.start}-{span.sequences.stop}-{span.tokens}.npz")
