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
from components.interpretation.examples import Firings
from components.language_model.hook_points import HookPoint, capture
from components.progress import progress
from components.sae.features import Features

_ENTRIES_AT_ONCE, _TOKENS_AT_ONCE = 1 << 25, 1 << 12

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
    device: torch.device

    @torch.no_grad()
    def batches(self) -> Iterator[Batch]:
        number = 0 if self.text.sequences is None else self.text.sequences.start
        with progress(logger, "interpret", min(self.tokens, self.text.tokens), "tokens") as advance:
            for block in self.text.batches(self.tokens, at_once(self.text, self.d_sae)):
                block = right_padded(block)
                counted = torch.tensor(counted_tokens(block, self.exclusion)).to(self.device)
                captured = capture(self.model, self.points, self.text.inputs(block, self.device))
                some = (captured[point] for point in self.points)
                columns = [column.to(torch.promote_types(column.dtype, torch.float32)) for column in some]
                for point, column in zip(self.points, columns, strict=True):
                    limit = self.exclusion.norm_limits.get(str(point))
                    if limit is not None:
                        counted = counted & (column.norm(dim=-1) <= limit)
                yield Batch(block, self.sae.encode(torch.cat(columns, dim=-1)[counted]), counted, number)
                number += len(block)
                advance(int((block.documents >= 0).sum()), "")


def at_once(text: HeldOut, d_sae: int) -> int:
    """Sequences that go through the language model together: always the same ones, so that what it rounds is the same however
    the text is cut."""
    return max(1, min(_TOKENS_AT_ONCE, _ENTRIES_AT_ONCE // d_sae) // text.manifest.context_length)


@dataclass(frozen=True)
class Batch:
    block: Sequences
    features: Features
    """Of the tokens that count, in order."""
    counted: Tensor
    """Which ones do, bool `[b, length]`."""
    first: int
    """The number of its first sequence."""

    @property
    def numbers(self) -> Tensor:
        """Of the sequences, `[b]`."""
        return torch.arange(self.first, self.first + len(self.block), device=self.counted.device)

    def activations(self, chosen: Tensor | None = None) -> Tensor:
        """Of these features, or of all: float32 `[b, length, chosen or d_sae]`, 0 at tokens that do not count."""
        dense = self.features.dense().float()
        dense = dense if chosen is None else dense[:, chosen]
        found = torch.zeros(*self.counted.shape, dense.shape[1], device=dense.device)
        found[self.counted] = dense
        return found

    def firings(self, chosen: Tensor | None = None) -> Firings:
        """Of these features, numbered as they are given, or of all."""
        tokens, features, values = self.features.firing()
        if chosen is not None:
            places = torch.full((self.features.d_sae,), -1, dtype=torch.int64, device=chosen.device)
            places[chosen] = torch.arange(len(chosen), device=chosen.device)
            own = places[features] >= 0
            tokens, features, values = tokens[own], places[features[own]], values[own]
        rows, where = self.counted.nonzero(as_tuple=True)
        columns = (self.block.documents, self.block.positions, self.block.tokens)
        documents, positions, ids = (torch.tensor(of).to(self.counted.device).long()[rows, where] for of in columns)
        return Firings(rows, where, documents, positions, ids, tokens, features, values.float())


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
