"""The two-pass shuffle: scatter every row over buckets, then shuffle every bucket alone.

Which bucket a row goes to, and where it stands in it, is a hash of its document and position: rows end up in one global
random permutation that does not depend on who did which part of the work, in what order, or how often; and where a token
is stored can be told without an index.

A scattered chunk is a file of records sorted by bucket, behind a table with one entry per bucket. A bucket of it is one
ranged read, so that both passes touch every byte once. Where that would be too many reads, chunks are merged first into
larger files of the same form; what comes of them is the same, as the order within a bucket is that of the hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from components import storage
from components.activations.dataset.schema import TOKEN_COLUMNS, Layout, memory
from components.settings import UserError

_ENTRY = np.dtype([("start", "<i8"), ("rows", "<i8"), ("xxh3", "<u8")])
_BLOCK_ROWS = 4096
MOST_READS = 1_000_000
"""Ranged reads of one shuffle; beyond, chunks are merged first."""
MERGE_BYTES = 1 << 29
LARGEST_UPLOAD = 10_000 * 50 * 2**20
"""Bytes of a file that s3fs can upload: so many parts of so much. No merged file is larger."""
_WIDTHS = (2, 4, 8, 16, 32, 64, 128, 256)
_MOST_LEVELS = 3


def bucket_of(documents: np.ndarray, positions: np.ndarray, buckets: int, seed: int) -> np.ndarray:
    """The bucket of each token, uniform over `buckets`."""
    return ((_mixed(documents, positions, seed) >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def order_of(documents: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """The permutation that shuffles a bucket, given its tokens in any order."""
    # The hash maps different tokens to different numbers, so there are no ties.
    return np.argsort(_mixed(documents, positions, seed ^ 0x5DEECE66D))


def write_scattered(columns: Mapping[str, np.ndarray], layout: Layout, buckets: int, seed: int, path: Path) -> None:
    """Write a chunk's rows, given as the bytes of each column `[n, column_bytes]`. Memory: one block of rows beyond it."""
    documents, positions = token_keys(columns)
    bucket = bucket_of(documents, positions, buckets, seed)
    block = np.empty((_BLOCK_ROWS, layout.row_bytes), dtype=np.uint8)
    parts = split_columns(block, layout)

    def records(rows: np.ndarray) -> np.ndarray:
        for name, part in parts.items():
            part[: len(rows)] = columns[name][rows]
        return block[: len(rows)]

    with path.open("wb") as stream, _table(stream, np.bincount(bucket, minlength=buckets)) as table:
        _write_sorted(stream, records, np.argsort(bucket, kind="stable"), table)


@dataclass(frozen=True)
class ShufflePlan:
    """How the scattered chunks are brought together: levels of merging `width` files into one, then bucket by bucket."""

    chunks: int
    width: int
    levels: int
    reads: int
    """Ranged reads in all, merging included."""
    bytes: int
    """Read in all; each level of merging reads and writes everything once more."""
    memory: int
    """Bytes at most that one merge holds."""
    largest: int
    """Bytes of the largest merged file, of which one stands beside its parts while it is written."""

    def files(self, level: int) -> int:
        """Files of a level; level 0 is the chunks."""
        return -(-self.chunks // self.width**level)


def plan_shuffle(
    chunks: int, buckets: int, chunk_bytes: int, most_reads: int | None = None, merge_bytes: int | None = None
) -> ShufflePlan:
    """The fewest levels, and then reads, with which no more than `most_reads` ranged reads are needed; where merged files would
    have to be larger than an upload, the fewest reads without.

    Without merging every bucket has a part in every chunk: 10^9 tokens of GPT-2 would be 2.3 * 10^8 reads of some rows.
    """
    most_reads, merge_bytes = most_reads or MOST_READS, merge_bytes or MERGE_BYTES
    best: ShufflePlan | None = None
    for levels in range(_MOST_LEVELS + 1):
        plans = []
        for width in _WIDTHS if levels else (1,):
            plan = ShufflePlan(chunks, width, levels, 0, (levels + 1) * chunks * chunk_bytes, merge_bytes, 0)
            reads = plan.files(levels) * (buckets + 1)
            for level in range(levels):
                # One more block than the bytes need: its buckets are whole.
                blocks = min(buckets, width ** (level + 1) * chunk_bytes // merge_bytes + 2)
                reads += plan.files(level) * (blocks + 1)
            largest = min(chunks, width**levels) * chunk_bytes if levels else 0
            plans.append(replace(plan, reads=reads, largest=largest))
        possible = [plan for plan in plans if plan.largest <= LARGEST_UPLOAD]
        if best is not None and len(possible) < len(plans):
            possible.append(best)  # narrow merges may be no better than none
        best = min(possible, key=lambda plan: plan.reads)
        if best.reads <= most_reads:
            break
    assert best is not None
    return best


class Scattered:
    """Files of records sorted by bucket, chunks or merged ones; their tables are read once."""

    def __init__(self, urls: Sequence[str], buckets: int, layout: Layout) -> None:
        self.urls, self.buckets, self.layout = urls, buckets, layout

    @cached_property
    def tables(self) -> np.ndarray:
        """`[files, buckets]` of entries. Raises a UserError that names a file whose table is none."""
        tables = np.empty((len(self.urls), self.buckets), dtype=_ENTRY)
        storage.read_ranges([(url, 0, memory(table)) for url, table in zip(self.urls, tables, strict=True)])
        for url, table in zip(self.urls, tables, strict=True):
            rows = table["rows"]
            if (rows < 0).any() or (rows > 1 << 40).any() or (table["start"] != np.cumsum(rows) - rows).any():
                raise UserError(f"{url} does not hold what was written (its table); delete it and run again")
        return tables

    def read(self, first: int, stop: int | None = None) -> np.ndarray:
        """All records of the buckets from `first` to `stop`, or of the one: uint8 `[n, row_bytes]`, file after file, the
        buckets of each in turn. Memory: the records, once.

        Raises a UserError that names a file which does not hold what was written.
        """
        tables = self.tables[:, first : first + 1 if stop is None else stop]
        width = self.layout.row_bytes
        rows = tables["rows"].sum(axis=1)
        records = np.empty((int(rows.sum()), width), dtype=np.uint8)
        raw = memory(records)
        places = np.concatenate([[0], np.cumsum(rows)]) * width
        begin = self.buckets * _ENTRY.itemsize + tables["start"][:, 0] * width
        storage.read_ranges(
            [
                (url, int(begin[file]), raw[int(places[file]) : int(places[file + 1])])
                for file, url in enumerate(self.urls)
                if rows[file]
            ]
        )
        place = 0
        for url, table in zip(self.urls, tables, strict=True):
            for bucket, (count, known) in enumerate(zip(table["rows"].tolist(), table["xxh3"].tolist(), strict=True), first):
                following = place + count * width
                if count and xxhash.xxh3_64_intdigest(raw[place:following]) != known:
                    raise UserError(f"{url} does not hold what was written (bucket {bucket}); delete it and run again")
                place = following
        return records

    def merge(self, path: Path, merge_bytes: int) -> None:
        """Write one file with the records of all. Memory: `merge_bytes`, or a bucket where that is more."""
        counts = self.tables["rows"]
        with path.open("wb") as stream, _table(stream, counts.sum(axis=0)) as table:
            first = 0
            while first < self.buckets:
                within = table["start"][first] + merge_bytes // self.layout.row_bytes
                stop = max(first + 1, int(np.searchsorted(table["start"] + table["rows"], within, side="right")))
                buckets = np.repeat(np.tile(np.arange(stop - first), len(counts)), counts[:, first:stop].ravel())
                records = self.read(first, stop)
                _write_sorted(stream, records.__getitem__, np.argsort(buckets, kind="stable"), table[first:stop])
                first = stop


@contextmanager
def _table(stream: BinaryIO, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The table of a file with so many rows in each bucket, at its beginning; checksums are noted in it meanwhile."""
    table = np.zeros(len(rows), dtype=_ENTRY)
    table["rows"] = rows
    table["start"] = np.cumsum(rows) - rows
    stream.write(table.tobytes())
    yield table
    stream.seek(0)
    stream.write(table.tobytes())


def _write_sorted(stream: BinaryIO, records: Callable[[np.ndarray], np.ndarray], order: np.ndarray, table: np.ndarray) -> None:
    """Write records in an order in which the buckets of a table follow each other, and note their checksums in it.

    records: those of some rows, uint8 `[n, row_bytes]`.
    """
    begin = table["start"][0]
    for entry in table:
        state = xxhash.xxh3_64()
        stop = entry["start"] - begin + entry["rows"]
        for start in range(entry["start"] - begin, stop, _BLOCK_ROWS):
            block = memory(records(order[start : min(start + _BLOCK_ROWS, stop)]))
            state.update(block)
            stream.write(block)
        entry["xxh3"] = state.intdigest()


def token_keys(columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Documents and positions, from the bytes of their columns."""
    documents, positions = (
        np.ascontiguousarray(columns[name]).view(TOKEN_COLUMNS[name].to_pandas_dtype()).reshape(-1)
        for name in ("document", "position")
    )
    return documents, positions


def split_columns(records: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Records, uint8 `[n, row_bytes]` -> a view of the bytes of each column, `[n, column_bytes]`."""
    columns, offset = {}, 0
    for name, width in layout.column_bytes.items():
        columns[name] = records[:, offset : offset + width]
        offset += width
    return columns


def _mixed(documents: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """64 well-mixed bits per token (the splitmix64 finalizer, a bijection; Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        key = (documents.astype(np.uint64) << np.uint64(32)) | positions.astype(np.uint64)
        z = key * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed * 0xD1342543DE82EF95 + 1) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
