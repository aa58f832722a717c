"""The held-out sequences of a token dataset, cut at a number of tokens, and what a model takes for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from components.corpus.images import ImageLayout
from components.corpus.manifest import TokenManifest
from components.corpus.tokens import PADDING, Sequences, read_sequences
from components.language_model.loading import ModelSource, forward_inputs

Predicts = Literal["next_token", "answer", "classes", "nothing"]
"""What the model does after the hook point: it predicts the next token of a text; it answers to an image and a prompt, or gives
each image a class, of which none is known to be right, so that they are compared; or it ends in states."""


@dataclass(frozen=True)
class Images:
    source: ModelSource
    layout: ImageLayout


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out sequences of a token dataset, or some of them."""

    url: str
    manifest: TokenManifest
    sequences: range | None = None
    """Which ones; all where it is not given."""
    images: Images | None = None
    """Of an image corpus, how the model sees them."""

    @property
    def predicts(self) -> Predicts:
        if self.images is None:
            return "next_token"
        if self.images.layout.of_text:
            return "answer"
        return "classes" if self.images.source.classifies else "nothing"

    def inputs(self, block: Sequences, device: torch.device) -> dict[str, Tensor]:
        """What the model's forward takes for sequences of these, padded on the right."""
        if self.images is None:
            return {"input_ids": torch.tensor(block.tokens).to(device).long()}
        return forward_inputs(self.images.source, block, device)

    @property
    def tokens(self) -> int:
        return self.manifest.splits["held_out"].tokens

    def batches(self, tokens: int, size: int) -> Iterator[Sequences]:
        """Sequences in blocks of `size` until `tokens` counted tokens; the last sequence is cut there."""
        left = tokens
        chosen = range(self.manifest.splits["held_out"].sequences) if self.sequences is None else self.sequences
        for start in range(chosen.start, chosen.stop, size):
            block = read_sequences(self.url, self.manifest, "held_out", start, min(start + size, chosen.stop))
            counted = block.documents >= 0
            running = counted.ravel().cumsum().reshape(counted.shape)
            documents = np.where(counted & (running > left), PADDING, block.documents)
            whole = (documents >= 0).any(axis=1)
            if whole.any():
                yield replace(block, documents=documents)[slice(int(whole.sum()))]
            left -= int(counted.sum())
            if left <= 0:
                return


def right_padded(block: Sequences) -> Sequences:
    """The same sequences with the padding on their left moved to their right.

    Causal attention then needs no mask, and a token's place is the one that it has without padding.
    """
    leading = (np.cumsum(block.documents != PADDING, axis=1) == 0).sum(axis=1)
    if not leading.any():
        return block
    length = block.tokens.shape[1]
    order = (np.arange(length)[None] + leading[:, None]) % length
    return replace(
        block,
        tokens=np.take_along_axis(block.tokens, order, axis=1),
        documents=np.take_along_axis(block.documents, order, axis=1),
        positions=np.take_along_axis(block.positions, order, axis=1),
    )
