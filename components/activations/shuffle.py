"""The two-pass shuffle: scatter every row over buckets, then shuffle every bucket alone.

Which bucket a row goes to, and where it stands in it, is a hash of its place in the corpus: rows end up in one global
random permutation that does not depend on who did which part of the work, in what order, or how often.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components import storage


def bucket_of(rows: np.ndarray, buckets: int, seed: int) -> np.ndarray:
    """The bucket of each global row number, uniform over `buckets`."""
    return (_mixed(rows, seed) >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)


def order_of(rows: np.ndarray, seed: int) -> np.ndarray:
    """The permutation that shuffles a bucket, given its global row numbers in any order."""
    rows = np.asarray(rows)
    return np.lexsort((rows, _mixed(rows, seed ^ 0x5DEECE66D)))


def write_scattered(table: pa.Table, rows: np.ndarray, buckets: int, seed: int, path: Path) -> None:
    """A chunk's rows as Parquet, one row group per bucket that it holds rows of, the row numbers beside them."""
    bucket = bucket_of(rows, buckets, seed)
    order = np.argsort(bucket, kind="stable")
    counts = np.bincount(bucket.astype(np.int64), minlength=buckets)
    table = table.append_column(_ROW, pa.array(rows)).take(pa.array(order))
    held = np.flatnonzero(counts)
    schema = table.schema.with_metadata({_BUCKETS: ",".join(map(str, held))})
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        start = 0
        for count in counts[held]:
            writer.write_table(table.slice(start, count).replace_schema_metadata(schema.metadata), row_group_size=int(count))
            start += int(count)


def read_bucket(chunks: list[str], bucket: int, seed: int, schema: pa.Schema) -> pa.Table:
    """All rows of a bucket from all scattered chunks, shuffled. Memory: one bucket, twice."""
    parts = []
    for url in chunks:
        filesystem, path = storage.resolve(url)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            held = file.schema_arrow.metadata[_BUCKETS].decode().split(",")
            if str(bucket) in held:
                parts.append(file.read_row_group(held.index(str(bucket)), use_threads=False))
    if not parts:
        return schema.empty_table()
    table = pa.concat_tables(parts).combine_chunks()
    order = order_of(table[_ROW].to_numpy(), seed)
    return table.drop_columns([_ROW]).take(pa.array(order)).cast(schema)


def _mixed(rows: np.ndarray, seed: int) -> np.ndarray:
    """64 well-mixed bits per row number (the splitmix64 finalizer; Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed * 0xD1342543DE82EF95 + 1) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


_ROW, _BUCKETS = "__row__", b"buckets"
