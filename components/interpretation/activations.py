"""One pass over held-out text: what every feature does on every token, a batch of sequences at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.activations.dataset.forward import counted_tokens
from components.activations.exclusion import Exclusion
from components.corpus.tokens import Sequences
from components.evaluation.held_out import HeldOut, right_padded
from components.interop.coders import AnySAE
from components.language_model.hook_points import HookPoint, capture
from components.progress import progress

_ENTRIES_AT_ONCE = 1 << 25

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pass:
    sae: AnySAE
    d_sae: int
    model: nn.Module
    points: tuple[HookPoint, ...]
    """What the coder reads, side by side."""
    text: HeldOut
    tokens: int
    """At most."""
    exclusion: Exclusion
    batch_sequences: int
    device: torch.device

    @torch.no_grad()
    def batches(self) -> Iterator[Batch]:
        length = self.text.manifest.context_length
        at_once = max(1, min(self.batch_sequences, _ENTRIES_AT_ONCE // (length * self.d_sae)))
        number = 0
        with progress(logger, "interpret", min(self.tokens, self.text.tokens), "tokens") as advance:
            for block in self.text.batches(self.tokens, at_once):
                block = right_padded(block)
                counted = torch.tensor(counted_tokens(block, self.exclusion)).to(self.device)
                ids = torch.tensor(block.tokens).to(self.device).long()
                captured = capture(self.model, self.points, {"input_ids": ids})
                some = (captured[point] for point in self.points)
                columns = [column.to(torch.promote_types(column.dtype, torch.float32)) for column in some]
                for point, column in zip(self.points, columns, strict=True):
                    limit = self.exclusion.norm_limits.get(str(point))
                    if limit is not None:
                        counted = counted & (column.norm(dim=-1) <= limit)
                x = torch.cat(columns, dim=-1)
                found = torch.zeros(*counted.shape, self.d_sae, device=self.device)
                features, _ = self.sae.reconstruct(x[counted])
                found[counted] = features.dense().float()
                numbers = torch.arange(number, number + len(block), device=self.device)
                documents, positions = (torch.tensor(of).to(self.device).long() for of in (block.documents, block.positions))
                yield Batch(block, found, numbers, documents, positions, int(counted.sum()))
                number += len(block)
                advance(int((block.documents >= 0).sum()), "")


@dataclass(frozen=True)
class Batch:
    block: Sequences
    activations: Tensor
    """float32 `[b, length, d_sae]`, 0 at tokens that do not count."""
    numbers: Tensor
    """Of the sequences, `[b]`."""
    documents: Tensor
    """Of the tokens, `[b, length]`, as are their positions in them."""
    positions: Tensor
    counted: int
    """Tokens."""


class ByNumber:
    """Held-out sequences by number, as the model saw them."""

    def __init__(self, text: HeldOut, tokens: int) -> None:
        self._blocks = [right_padded(block) for block in text.batches(tokens, 256)]
        self._starts = np.cumsum([0, *map(len, self._blocks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def of(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, documents and positions."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        block, row = self._blocks[place], number - int(self._starts[place])
        return block.tokens[row], block.documents[row], block.positions[row]
