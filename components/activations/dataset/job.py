"""What there is to do for one activation dataset: its identity, its chunks and buckets, and where each of them goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from components import storage
from components.activations.dataset.schema import Layout
from components.activations.dataset.shuffle import ShufflePlan, plan_shuffle
from components.activations.settings import ActivationSettings
from components.corpus.manifest import TokenManifest, TokenSplit
from components.corpus.tokens import Sequences, read_sequences
from components.language_model.hook_points import HookPoint, parse_hook_point
from components.language_model.loading import ModelSource


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """One dataset's work, cut into chunks and buckets."""

    url: str
    digest: str
    identity: dict[str, Any]
    configuration: dict[str, Any]
    settings: ActivationSettings
    source: ModelSource
    widths: dict[str, int]
    """Of the hook points, in the order of the columns."""
    token_url: str
    token_manifest: TokenManifest
    seed: int

    @cached_property
    def split(self) -> TokenSplit:
        return self.token_manifest.splits[self.settings.split]

    @property
    def chunks(self) -> int:
        return -(-self.split.sequences // self.settings.sequences_per_chunk)

    @property
    def buckets(self) -> int:
        return max(1, round(self.split.tokens / self.settings.rows_per_shard))

    @property
    def points(self) -> list[HookPoint]:
        return [parse_hook_point(name) for name in self.widths]

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.widths, self.settings.dtype)

    @property
    def scatter_url(self) -> str:
        """Where scattered chunks wait. Their size is part of the name: it decides what is in them, not what comes of them."""
        return storage.join(self.url, "scatter", str(self.settings.sequences_per_chunk))

    @property
    def exclusion_url(self) -> str:
        """Which tokens do not count, in numbers; where there are some."""
        return storage.join(self.url, "scatter", "exclusion.json")

    def chunk_name(self, chunk: int) -> str:
        return f"chunk-{chunk:06d}.bin"

    def chunk_url(self, chunk: int) -> str:
        return storage.join(self.scatter_url, self.chunk_name(chunk))

    @cached_property
    def shuffle(self) -> ShufflePlan:
        rows = self.settings.sequences_per_chunk * self.token_manifest.context_length
        return plan_shuffle(self.chunks, self.buckets, rows * self.layout.row_bytes)

    def merged_name(self, level: int, index: int) -> str:
        """Of a file that holds `width ** level` chunks; level 0 is the chunks themselves."""
        return f"merged-{self.shuffle.width}-{level}-{index:06d}.bin" if level else self.chunk_name(index)

    def merged_url(self, level: int, index: int) -> str:
        return storage.join(self.scatter_url, self.merged_name(level, index))

    def shard_name(self, bucket: int) -> str:
        return f"shard-{bucket:05d}.parquet"

    def record_name(self, bucket: int) -> str:
        return f"shard-{bucket:05d}.json"

    def record_url(self, bucket: int) -> str:
        return storage.join(self.scatter_url, self.record_name(bucket))


def chunk_sequences(work: Extraction, chunk: int) -> Sequences:
    """The token sequences of a chunk."""
    size = work.settings.sequences_per_chunk
    return read_sequences(work.token_url, work.token_manifest, work.settings.split, chunk * size, (chunk + 1) * size)
