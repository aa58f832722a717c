"""The held-out sequences of a token dataset, cut at a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from components.corpus.manifest import TokenManifest
from components.corpus.tokens import PADDING, Sequences, read_sequences


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out sequences of a token dataset, or some of them."""

    url: str
    manifest: TokenManifest
    sequences: range | None = None
    """Which ones; all where it is not given."""

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
                yield Sequences(tokens=block.tokens, documents=documents, positions=block.positions)[slice(int(whole.sum()))]
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
    return Sequences(
        tokens=np.take_along_axis(block.tokens, order, axis=1),
        documents=np.take_along_axis(block.documents, order, axis=1),
        positions=np.take_along_axis(block.positions, order, axis=1),
    )
