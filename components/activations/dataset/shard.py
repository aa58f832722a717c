"""A shard: one bucket's rows as Parquet, laid out so that a reader needs no Parquet library to get at the values.

Every column chunk is one PLAIN page without a dictionary: a header of a few bytes, then the values of the row group as
they are in memory. The manifest holds where they start, so that a read is one range, straight into place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from components.activations.dataset.manifest import Column, RowGroup, Shard
from components.activations.dataset.schema import Layout, as_float32, memory
from components.activations.dataset.shuffle import order_of, split_columns, token_keys
from components.storage import file_sha256

LARGEST_PAGE = 2**31 - 2**16
"""Bytes; Parquet counts a page in 32 bits."""
_CODECS = {"lz4": "lz4_raw", "zstd": "zstd"}  # as Parquet calls them in its files
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Written:
    """A shard's manifest entry, and the sums of its activations."""

    shard: Shard
    sums: dict[str, dict[str, Any]]


def write_shard_file(
    records: np.ndarray, layout: Layout, *, seed: int, rows_per_group: int, compression: str, path: Path, name: str
) -> Written:
    """Shuffle records, uint8 `[n, row_bytes]`, into a Parquet file at `path`, and read it back to be sure.

    Memory: the records and a few row groups.
    """
    documents, positions = token_keys(split_columns(records, layout))
    order = order_of(documents, positions, seed)
    checksums: dict[str, list[str]] = {column: [] for column in layout.column_bytes}
    with pq.ParquetWriter(
        path,
        layout.arrow,
        compression=compression,
        use_dictionary=False,
        write_statistics=["document", "position"],
        data_page_size=LARGEST_PAGE,
        max_rows_per_page=rows_per_group + 1,
    ) as writer:
        for start in range(0, len(order), rows_per_group):
            block = records[order[start : start + rows_per_group]]
            columns = {column: np.ascontiguousarray(raw) for column, raw in split_columns(block, layout).items()}
            writer.write_table(layout.table(columns), row_group_size=len(block))
            for column, raw in columns.items():
                checksums[column].append(xxhash.xxh3_64_hexdigest(memory(raw)))
    written = describe_shard_file(path, layout, name)
    if checksums != {column: [group.xxh3 for group in groups] for column, groups in written.shard.groups.items()}:
        raise OSError(f"{path} does not hold what was written to it")
    return written


def describe_shard_file(path: Path, layout: Layout, name: str) -> Written:
    """The manifest entry and the sums of the shard at `path`, from the file alone."""
    places: dict[str, list[RowGroup]] = {column: [] for column in layout.column_bytes}
    sums = {hook_point: _Sums(width) for hook_point, width in layout.widths.items()}
    with pq.ParquetFile(path) as file, path.open("rb") as stream:
        rows = file.metadata.num_rows
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            for number, (column, width) in enumerate(layout.column_bytes.items()):
                raw = _bytes(table[column], width)
                places[column].append(_place(stream, file.metadata.row_group(group).column(number), raw))
                if column in sums:
                    sums[column].add(as_float32(raw, layout.dtype))
    groups = {column: tuple(found) for column, found in places.items()}
    shard = Shard(name=name, rows=rows, bytes=path.stat().st_size, sha256=file_sha256(path), groups=groups)
    return Written(shard=shard, sums={hook_point: added.result() for hook_point, added in sums.items()})


def describe_columns(layout: Layout, sums: Sequence[dict[str, dict[str, Any]]], tokens: int) -> tuple[Column, ...]:
    """The columns of a dataset from the sums of its shards, in their order."""
    columns = []
    for name, width in layout.widths.items():
        own = [entry[name] for entry in sums]
        columns.append(
            Column(
                hook_point=name,
                d_in=width,
                dtype=layout.dtype,  # type: ignore[arg-type]  # which is checked as it is validated
                mean=tuple((np.sum([entry["sum"] for entry in own], axis=0) / tokens).tolist()),
                mean_squared_norm=sum(entry["squares"] for entry in own) / tokens,
                median_norm=own[0]["median_norm"],
            )
        )
    return tuple(columns)


def decoded(raw: bytes | memoryview, size: int, compression: str) -> memoryview:
    """The values of a row group's column from its bytes on disk."""
    if compression == "none":
        return memoryview(raw)
    return memoryview(pa.decompress(raw, decompressed_size=size, codec=_CODECS[compression])).cast("B")


def _place(stream: BinaryIO, chunk: Any, raw: np.ndarray) -> RowGroup:
    """Where the values of one column of a row group are, and their checksum. chunk: its metadata; raw: what Parquet reads."""
    # A page's header is not compressed: it is what the chunk's uncompressed size has beyond the values.
    header = chunk.total_uncompressed_size - raw.nbytes
    checksum = xxhash.xxh3_64_hexdigest(memory(raw))
    place = RowGroup(offset=chunk.data_page_offset + header, bytes=chunk.total_compressed_size - header, xxh3=checksum)
    stream.seek(place.offset)
    values = decoded(stream.read(place.bytes), raw.nbytes, _compression(chunk))
    if xxhash.xxh3_64_hexdigest(values) != checksum:
        raise OSError(f"{stream.name} does not hold what was written to it: values of {chunk.path_in_schema}")
    return place


def _compression(chunk: Any) -> str:
    return {"UNCOMPRESSED": "none", "LZ4": "lz4", "LZ4_RAW": "lz4", "ZSTD": "zstd"}[chunk.compression]


def _bytes(column: pa.ChunkedArray, width: int) -> np.ndarray:
    array = column.combine_chunks()
    whole = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return whole[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


class _Sums:
    """Sums of one hook point's activations in float64, and all norms. In numpy: these run in threads (see the reader)."""

    def __init__(self, width: int) -> None:
        self.total = np.zeros(width)
        self.squares = 0.0
        self.norms: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        step = max(1, _BLOCK_ELEMENTS // values.shape[1])
        for start in range(0, len(values), step):
            block = values[start : start + step].astype(np.float64)
            squares = np.einsum("nd,nd->n", block, block)
            self.total += block.sum(axis=0)
            self.squares += float(squares.sum())
            self.norms.append(np.sqrt(squares))

    def result(self) -> dict[str, Any]:
        median = float(np.median(np.concatenate(self.norms))) if self.norms else 0.0
        return {"sum": self.total.tolist(), "squares": self.squares, "median_norm": median}
