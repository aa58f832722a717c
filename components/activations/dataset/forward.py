"""The forward pass of extraction: a block of token sequences in, the bytes of its counted rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.activations.dataset.schema import DTYPES, as_float32, bytes_from_tensor
from components.activations.exclusion import NOTHING, Exclusion
from components.activations.settings import ExcludeSettings
from components.corpus.manifest import TokenManifest
from components.corpus.tokens import PADDING, Sequences, read_sequences
from components.language_model.hook_points import HookPoint, capture
from components.language_model.loading import ModelSource, forward_inputs
from components.settings import UserError

_SAMPLE_TOKENS = 16_384
_LARGEST_LOSS = 0.01
"""Of the sum of magnitudes, in storing them; rounding to bfloat16 takes about 0.001."""


@dataclass(frozen=True)
class Chunk:
    """The counted tokens of a block of sequences: the bytes of each column, uint8 `[n, column_bytes]`."""

    columns: dict[str, np.ndarray]


def run_chunk(
    source: ModelSource,
    model: nn.Module,
    points: Sequence[HookPoint],
    sequences: Sequences,
    dtype: str,
    device: torch.device,
    exclusion: Exclusion = NOTHING,
) -> Chunk:
    """The activations of the counted tokens of these sequences at each hook point, with the tokens.

    exclusion: tokens that do not count besides. A norm over its limit at one hook point leaves the token out at all.
    Nothing waits for the device before the last batch is queued: which rows are counted is known beforehand, and what
    leaves the device goes to pinned memory on a stream of its own.
    Raises a UserError when an activation does not fit the number format `dtype`.
    """
    counted = counted_tokens(sequences, exclusion)
    kept: dict[HookPoint, Tensor] = {}
    fits = {point: _Fit(device) for point in points}
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    size = source.settings.batch_sequences
    start = 0
    for first in range(0, len(sequences), size):
        block = sequences[first : first + size]
        rows = torch.from_numpy(np.flatnonzero(counted[first : first + size])).to(device, non_blocking=True)
        captured = capture(model, points, forward_inputs(source, block, device))
        stop = start + len(rows)
        for point, activation in captured.items():
            chosen = activation.flatten(0, 1).index_select(0, rows)
            values = chosen.to(DTYPES[dtype])
            fits[point].add(chosen, values)
            if point not in kept:
                shape = (int(counted.sum()), values.shape[1])
                kept[point] = torch.empty(shape, dtype=values.dtype, pin_memory=copies is not None)
            _copy(values, kept[point][start:stop], copies)
        start = stop
    if copies is not None:
        torch.cuda.synchronize(device)
    for point, fit in fits.items():
        fit.require(point, dtype, source.settings.dtype)
    columns = {
        "document": _bytes(sequences.documents[counted], np.int64),
        "position": _bytes(sequences.positions[counted], np.int32),
        "token": _bytes(sequences.tokens[counted], np.int32),
    }
    columns |= {str(point): bytes_from_tensor(kept[point]) for point in points}
    within = np.ones(int(counted.sum()), dtype=bool)
    for name, limit in exclusion.norm_limits.items():
        within &= _norms(columns[name], dtype) <= limit
    return Chunk(columns if within.all() else {name: column[within] for name, column in columns.items()})


class _Fit:
    """How well a number format holds the activations of a hook point; nothing waits for the device before it is asked."""

    def __init__(self, device: torch.device) -> None:
        self.computed = self.stored = torch.ones((), dtype=torch.bool, device=device)
        self.size = self.lost = torch.zeros((), device=device)

    def add(self, chosen: Tensor, values: Tensor) -> None:
        self.computed = self.computed & torch.isfinite(chosen).all()
        self.stored = self.stored & torch.isfinite(values).all()
        exact = chosen.float()
        self.size = self.size + exact.abs().sum()
        self.lost = self.lost + (exact - values.float()).abs().sum()

    def require(self, point: HookPoint, dtype: str, computed_in: str) -> None:
        """A UserError where the model's own values are none, or the format changes them by more than rounding does."""
        if not self.computed:
            raise UserError(
                f"language_model.dtype: the model's activations at {point} are not finite in '{computed_in}'; use another "
                "format, and see whether its weights are whole"
            )
        if not self.stored:
            raise UserError(
                f"activations.dtype: '{dtype}' cannot hold the activations at {point}, which overflow; use bfloat16 or float32"
            )
        if self.lost > _LARGEST_LOSS * self.size:
            raise UserError(
                f"activations.dtype: '{dtype}' loses {float(self.lost / self.size):.0%} of the activations at {point}, which "
                "are too small for it; use bfloat16 or float32"
            )


def counted_tokens(sequences: Sequences, exclusion: Exclusion) -> np.ndarray:
    """Which tokens count as far as positions and ids go, bool `[n, context_length]`; padding and what a tokenizer adds never
    do."""
    counted = sequences.documents >= 0
    if exclusion.positions:
        places = (sequences.documents != PADDING).cumsum(axis=1) - 1
        counted &= ~np.isin(places, exclusion.positions)
    return counted & ~np.isin(sequences.tokens, exclusion.token_ids) if exclusion.token_ids else counted


def resolve_exclusion(
    settings: ExcludeSettings,
    source: ModelSource,
    model: nn.Module,
    points: Sequence[HookPoint],
    url: str,
    manifest: TokenManifest,
    device: torch.device,
) -> Exclusion:
    """The mask in numbers: limits are multiples of the median norm among about 16,384 of the other training tokens, in
    sequences that are spread evenly over the split. Memory: their activations."""
    plain = Exclusion(positions=settings.positions, token_ids=settings.token_ids)
    if settings.norms_above is None:
        return plain
    split = manifest.splits["train"]
    chosen = min(split.sequences, max(1, -(-_SAMPLE_TOKENS * split.sequences // split.tokens)))
    norms: dict[str, list[np.ndarray]] = {str(point): [] for point in points}
    for number in (np.arange(chosen) * split.sequences // chosen).tolist():
        sequences = read_sequences(url, manifest, "train", number, number + 1)
        columns = run_chunk(source, model, points, sequences, "float32", device, plain).columns
        for name, found in norms.items():
            found.append(_norms(columns[name], "float32"))
    limits = {name: settings.norms_above * float(np.median(np.concatenate(found))) for name, found in norms.items()}
    return plain.model_copy(update={"norm_limits": limits})


def _norms(raw: np.ndarray, dtype: str) -> np.ndarray:
    return np.linalg.norm(as_float32(raw, dtype), axis=1)


def _copy(values: Tensor, target: Tensor, stream: torch.cuda.Stream | None) -> None:
    if stream is None:
        target.copy_(values)
        return
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        target.copy_(values, non_blocking=True)
    values.record_stream(stream)


def _bytes(values: np.ndarray, kind: type) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=kind).view(np.uint8).reshape(len(values), np.dtype(kind).itemsize)
