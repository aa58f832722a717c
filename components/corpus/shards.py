"""The files of a token dataset: shards, one row a sequence, and the table of its documents."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components import storage
from components.corpus.manifest import Split, TokenShard, TokenSplit
from components.settings import UserError

_ROWS_PER_GROUP = 16_384


class ShardWriter:
    """Shards of one split, each put in one piece."""

    def __init__(self, split: Split, url: str) -> None:
        self.split, self.url = split, url
        self.made: list[TokenShard] = []

    def write(self, tokens: np.ndarray, documents: np.ndarray, positions: np.ndarray, **others: pa.Array) -> None:
        """A shard of sequences, arrays `[n, length]`. others: columns of what is compressed already."""
        columns = {
            "tokens": _rows(tokens, np.int32),
            "documents": _rows(documents, np.int64),
            "positions": _rows(positions, np.int32),
        }
        compression = {f"{name}.list.element": "zstd" for name in columns} | dict.fromkeys(others, "none")
        name = f"{self.split}-{len(self.made):05d}.parquet"
        with storage.whole_file(storage.join(self.url, name)) as path:
            pq.write_table(pa.table(columns | others), path, compression=compression)
            size, sha256 = path.stat().st_size, storage.file_sha256(path)
        self.made.append(TokenShard(name=name, sequences=len(tokens), bytes=size, sha256=sha256))


class DocumentTable:
    """`documents.parquet`, in row groups of a useful size; it is there when all rows are."""

    def __init__(self, url: str, schema: pa.Schema) -> None:
        self._url, self._schema, self._open = storage.join(url, "documents.parquet"), schema, ExitStack()
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> DocumentTable:
        path = self._open.enter_context(storage.whole_file(self._url))
        self._writer = self._open.enter_context(pq.ParquetWriter(path, self._schema, compression="zstd"))
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
        self._open.__exit__(*error)

    def add(self, *row: Any) -> None:
        """More values than there are columns are left out."""
        self._rows.append(row[: len(self._schema)])
        if len(self._rows) == _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(column) for column in zip(*self._rows, strict=True)]
            self._writer.write_table(pa.table(columns, schema=self._schema))
            self._rows = []


def require_tokens(splits: Mapping[Split, TokenSplit], what: str, documents: int, held_out_fraction: float) -> None:
    """A UserError where a split has none. what: a document, in one word."""
    for split, entry in splits.items():
        if entry.tokens == 0:
            raise UserError(
                f"corpus: no {what} is left for the {split} split out of {documents}; use a larger corpus or another "
                f"corpus.held_out_fraction than {held_out_fraction}"
            )


def _rows(values: np.ndarray, kind: type) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(values.astype(kind).ravel(), values.shape[1])
