"""What new weights take from the data before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache

import torch
from torch import Tensor

from components.sae.coder import Coder
from components.training.batches import Statistics, open_source, scaled_batches, scaled_mean, side_by_side
from components.training.job import Training

SAMPLE_TOKENS = 16_384
"""Of the first that are trained on: at least so many are read for what the manifest does not say."""
_CPU = torch.device("cpu")


def begin_from_data(coder: Coder, job: Training, reads: Sequence[Statistics], writes: Sequence[Statistics]) -> None:
    """`begin` from the data of a job.

    Computed on the CPU, from batches that depend on the job alone: the same weights on every device, and beside other coders.
    """
    begin(coder, job.seed, lambda: _sample(job, reads, writes), (scaled_mean(reads, _CPU), scaled_mean(writes, _CPU)))


def begin(coder: Coder, seed: int, sample: Callable[[], tuple[Tensor, Tensor]], means: tuple[Tensor, Tensor]) -> None:
    """A new coder as its settings want it that are taken from data.

    sample: some rows of what is read `[n, d_in]` and of what is written `[n, d_out]`, asked for where the settings need them.
    means: of all of both.
    """
    settings, sample = coder.settings, cache(sample)
    points: tuple[Tensor, Tensor] | None = None
    if settings.decoder_bias_init == "mean":
        points = means
    elif settings.decoder_bias_init == "geometric_median":
        x, y = sample()
        written = geometric_median(y)
        points = (written if coder.reads == coder.writes else geometric_median(x)), written
    if settings.active_subspace is not None or settings.decoder_token_share > 0:
        origins = points or (torch.zeros(()), torch.zeros(()))
        read, written = (rows - origin for rows, origin in zip(sample(), origins, strict=True))
        if settings.active_subspace is not None:
            coder.confine(*(principal_directions(rows, settings.active_subspace) for rows in (read, written)))
        if settings.decoder_token_share > 0:
            drawn = _drawn(len(read), coder.features_of_all, seed)[coder.first_feature :][: coder.d_sae]
            coder.lean(read[drawn], written[drawn], settings.decoder_token_share)
    if points is not None:
        coder.centre(*points)
    if settings.first_density is not None:
        coder.fire_on(sample()[0], settings.first_density)


def _drawn(tokens: int, count: int, seed: int) -> Tensor:
    """So many of the tokens, each as often as any other up to one time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(tokens, generator=generator) for _ in range(-(-count // tokens))])[:count]


def principal_directions(rows: Tensor, share: float) -> Tensor:
    """Orthonormal columns `[width, m]`, float64: the fewest directions from zero in which rows `[n, width]` have that share of
    their squared norm."""
    rows = rows.double()
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    held = values.cumsum(0) / values.sum()
    return vectors[:, : int((held < share - 1e-12).sum()) + 1]


def geometric_median(rows: Tensor, tolerance: float = 1e-10, most: int = 1_000) -> Tensor:
    """The point with the smallest sum of distances to rows `[n, width]`, in float64 `[width]`: Weiszfeld's iteration from the
    mean on, until a step is shorter than `tolerance` times the mean distance, or `most` of them."""
    rows = rows.double()
    point = rows.mean(dim=0)
    for _ in range(most):
        distance = (rows - point).norm(dim=1)
        weight = 1.0 / distance.clamp_min(torch.finfo(rows.dtype).tiny ** 0.5)
        following = (weight @ rows) / weight.sum()
        step, point = (following - point).norm(), following
        if step <= tolerance * distance.mean():
            break
    return point


def _sample(job: Training, reads: Sequence[Statistics], writes: Sequence[Statistics]) -> tuple[Tensor, Tensor]:
    """The first rows of the training (of its first generation, where it has those), scaled: what is read `[n, d_in]` and what
    is written `[n, d_out]`."""
    columns = {column.column.name: column for column in (*reads, *writes)}
    reader = open_source(job, tuple(columns), _CPU).first
    rows = []
    with closing(scaled_batches(reader, list(columns.values()), 0, _CPU)) as batches:
        for _ in range(-(-SAMPLE_TOKENS // job.settings.batch_size)):
            rows.append({name: values.clone() for name, values in next(batches).items()})
    whole = {name: torch.cat([batch[name] for batch in rows]) for name in columns}
    return side_by_side(whole, job.reads), side_by_side(whole, job.writes)
