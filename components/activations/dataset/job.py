"""What there is to do for one activation dataset: its identity, its chunks and buckets, and where each of them goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from components import storage
from components.activations.dataset.schema import Layout
from components.activations.dataset.shuffle import ShufflePlan, plan_shuffle
from components.activations.settings import ActivationSettings
from components.corpus.manifest import Split, TokenManifest, TokenSplit
from components.corpus.tokens import Sequences, read_pieces
from components.language_model.hook_points import HookPoint, parse_hook_point
from components.language_model.loading import ModelSource

_COUNTED_AT_ONCE = 4_096


@dataclass(frozen=True)
class Part:
    """Some of the sequences of a split."""

    pieces: tuple[tuple[int, int], ...]
    """Neighbouring ones, first and the one after the last, in their order."""
    tokens: int
    """That count, see `TokenSplit`."""
    documents: int
    """That have a token in it."""

    @property
    def sequences(self) -> int:
        return sum(stop - first for first, stop in self.pieces)

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The pieces of its sequences from `start` to `stop`, counted in this part."""
        return sliced(self.pieces, start, stop)


def sliced(pieces: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """What the numbers from `start` to `stop` are, where those of the pieces are counted one after the other."""
    found = []
    for first, last in pieces:
        low, high = max(first, first + start), min(last, first + stop)
        if low < high:
            found.append((low, high))
        start, stop = start - (last - first), stop - (last - first)
    return found


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
    part: Part | None = None
    """The sequences of the split that it takes; all of them where there is none."""
    shared_url: str | None = None
    """Where several datasets share what decides which tokens count; its own folder of chunks where there is none."""

    @cached_property
    def split(self) -> TokenSplit:
        """What there is to do: the split, or a part of it."""
        whole = self.token_manifest.splits[self.settings.split]
        if self.part is None:
            return whole
        part = self.part
        return whole.model_copy(update={"tokens": part.tokens, "sequences": part.sequences, "documents": part.documents})

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
        return storage.join(self.shared_url or storage.join(self.url, "scatter"), "exclusion.json")

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
    size, split = work.settings.sequences_per_chunk, work.settings.split
    first, stop = chunk * size, (chunk + 1) * size
    pieces = [(first, stop)] if work.part is None else work.part.within(first, stop)
    return read_pieces(work.token_url, work.token_manifest, split, pieces)


def count_part(token_url: str, manifest: TokenManifest, split: Split, pieces: Sequence[tuple[int, int]]) -> Part:
    """Some sequences, with what counts in them. Memory: two shards of tokens, and a number per document."""
    tokens, documents = 0, np.empty(0, dtype=np.int64)
    for begin in range(0, sum(stop - first for first, stop in pieces), _COUNTED_AT_ONCE):
        some = sliced(pieces, begin, begin + _COUNTED_AT_ONCE)
        found = read_pieces(token_url, manifest, split, some).documents
        counted = found[found >= 0]
        tokens, documents = tokens + len(counted), np.union1d(documents, counted)
    return Part(tuple(pieces), tokens, len(documents))
