"""How much of a disk generations take, so that what they may take is never exceeded."""

from __future__ import annotations

from dataclasses import dataclass

from components.activations.dataset.schema import Layout
from components.activations.dataset.shuffle import plan_shuffle
from components.activations.settings import ActivationSettings
from components.settings import UserError

_SHARD = 8_192
_GROUP = 320
_NUMBER = 32
"""Bytes that a shard, a row group of a column, and a component of a mean vector in JSON take at most besides the values:
Parquet's headers and footer, and what manifest, `first.json` and the shards' own records say of them."""


@dataclass(frozen=True)
class Space:
    """Bytes at most of one generation."""

    kept: int
    """Once it is whole."""
    making: int
    """While it is made: scattered chunks and shards stand side by side."""


def generation_space(settings: ActivationSettings, layout: Layout, sequences: int, context_length: int) -> Space:
    """Of a generation with so many sequences, in which every token counts."""
    rows = sequences * context_length
    shards = max(1, round(rows / settings.rows_per_shard))
    groups = rows // settings.rows_per_group + shards
    columns = len(layout.column_bytes)
    beside = (shards + 2) * (_SHARD + _NUMBER * sum(layout.widths.values())) + 2 * groups * columns * _GROUP
    chunks = -(-sequences // settings.sequences_per_chunk)
    plan = plan_shuffle(chunks, shards, settings.sequences_per_chunk * context_length * layout.row_bytes)
    tables = (chunks + plan.files(plan.levels)) * (shards * 24 + 4_096)
    values = rows * layout.row_bytes
    return Space(kept=values + beside, making=2 * values + 2 * beside + tables + plan.largest)


def require_space(settings: ActivationSettings, layout: Layout, sequences: int, context_length: int, count: int) -> None:
    """A UserError where `disk_bytes` does not hold a generation in the making, beside those of all `count` that are read."""
    space = generation_space(settings, layout, sequences, context_length)
    beside = min(settings.generations_mixed or 1, count - 1)
    needed = space.making + beside * space.kept
    assert settings.disk_bytes is not None
    if settings.disk_bytes < needed:
        read = f" beside {beside} that are read ({space.kept:,} each)" if beside else ""
        fewer = " or generations_mixed" if beside > 1 else ""
        raise UserError(
            f"activations.disk_bytes: {settings.disk_bytes:,} do not hold a generation of {sequences * context_length:,} "
            f"tokens while it is shuffled ({space.making:,}){read}: give at least {needed:,}, or lower "
            f"activations.generation_tokens{fewer}"
        )
