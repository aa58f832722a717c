"""The two-pass shuffle: scatter every row over buckets, then shuffle every bucket alone.

Which bucket a row goes to, and where it stands in it, is a hash of its document and position: rows end up in one global
random permutation that does not depend on who did which part of the work, in what order, or how often; and where a token
is stored can be told without an index.

A scattered chunk is a file of records sorted by bucket, behind a table with one entry per bucket. A bucket of it is one
ranged read after a look at its entry, so that both passes touch every byte once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from components import storage
from components.activations.dataset.schema import TOKEN_COLUMNS, Layout, memory
from components.settings import UserError

_ENTRY = np.dtype([("start", "<i8"), ("rows", "<i8"), ("xxh3", "<u8")])
_BLOCK_ROWS = 4096


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
    order = np.argsort(bucket, kind="stable")
    table = np.zeros(buckets, dtype=_ENTRY)
    table["rows"] = np.bincount(bucket, minlength=buckets)
    table["start"] = np.cumsum(table["rows"]) - table["rows"]
    block = np.empty((_BLOCK_ROWS, layout.row_bytes), dtype=np.uint8)
    with path.open("wb") as stream:
        stream.write(table.tobytes())
        for entry in table:
            state = xxhash.xxh3_64()
            stop = entry["start"] + entry["rows"]
            for start in range(entry["start"], stop, _BLOCK_ROWS):
                rows = order[start : min(start + _BLOCK_ROWS, stop)]
                offset = 0
                for name, width in layout.column_bytes.items():
                    block[: len(rows), offset : offset + width] = columns[name][rows]
                    offset += width
                state.update(memory(block[: len(rows)]))
                stream.write(memory(block[: len(rows)]))
            entry["xxh3"] = state.intdigest()
        stream.seek(0)
        stream.write(table.tobytes())


def read_bucket(chunks: Sequence[str], bucket: int, buckets: int, layout: Layout) -> np.ndarray:
    """All records of one of `buckets`, uint8 `[n, row_bytes]`, chunk after chunk. Memory: the bucket, once.

    Raises a UserError that names a chunk which does not hold what was written.
    """
    table = np.empty(len(chunks), dtype=_ENTRY)
    size = _ENTRY.itemsize
    entries = memory(table)
    storage.read_ranges([(url, bucket * size, entries[i * size : (i + 1) * size]) for i, url in enumerate(chunks)])
    records = np.empty((int(table["rows"].sum()), layout.row_bytes), dtype=np.uint8)
    raw = memory(records)
    parts = []
    start = 0
    for entry, url in zip(table, chunks, strict=True):
        stop = start + int(entry["rows"]) * layout.row_bytes
        if stop > start:
            parts.append((url, buckets * size + int(entry["start"]) * layout.row_bytes, raw[start:stop]))
        start = stop
    storage.read_ranges(parts)
    for (url, _, part), entry in zip(parts, table[table["rows"] > 0], strict=True):
        if xxhash.xxh3_64_intdigest(part) != entry["xxh3"]:
            raise UserError(f"{url} does not hold what was written (bucket {bucket}); delete it and run again")
    return records


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
