"""The columns of an activation dataset, and the way between bytes, Arrow, numpy and torch without a copy.

One row is one token: `document` int64, `position` int32 (token index in the document), `token` int32, and for each hook
point a fixed-size binary of `d_in * itemsize` bytes. (Fixed-size lists of float16 were measured 4 to 12 times slower.)
Every column has a fixed width, so that the rows of a column are one block of bytes wherever they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TOKEN_COLUMNS = {"document": pa.int64(), "position": pa.int32(), "token": pa.int32()}
_TORCH_TYPES = {pa.int64(): torch.int64, pa.int32(): torch.int32}
TOKEN_BYTES = 8 + 4 + 4
"""Bytes that a row takes besides its activations."""


@dataclass(frozen=True)
class Layout:
    """The columns of a dataset: `d_in` per hook point, and one number format for all."""

    widths: Mapping[str, int]
    dtype: str

    @cached_property
    def column_bytes(self) -> dict[str, int]:
        """Bytes of one row of each column, in the order of the columns."""
        tokens = {name: kind.byte_width for name, kind in TOKEN_COLUMNS.items()}
        return tokens | {name: width * DTYPES[self.dtype].itemsize for name, width in self.widths.items()}

    @property
    def row_bytes(self) -> int:
        return sum(self.column_bytes.values())

    @cached_property
    def arrow(self) -> pa.Schema:
        fields = [pa.field(name, kind, nullable=False) for name, kind in TOKEN_COLUMNS.items()]
        for name, width in self.widths.items():
            metadata = {"dtype": self.dtype, "shape": f"[{width}]", "hook_point": name}
            fields.append(pa.field(name, pa.binary(self.column_bytes[name]), nullable=False, metadata=metadata))
        return pa.schema(fields)

    def table(self, columns: Mapping[str, np.ndarray]) -> pa.Table:
        """Columns of bytes, uint8 `[n, column_bytes]` and contiguous, as Arrow sees them over the same memory."""
        arrays = []
        for field in self.arrow:
            raw = columns[field.name]
            arrays.append(pa.Array.from_buffers(field.type, len(raw), [None, pa.py_buffer(raw)]))
        return pa.Table.from_arrays(arrays, schema=self.arrow)

    def tensor(self, column: str, raw: np.ndarray) -> Tensor:
        """The bytes of a column, uint8 `[n, column_bytes]`, as a tensor over the same memory: `[n, d_in]` of a hook point,
        `[n]` of a token column."""
        # Reinterpreted in torch: every tensor on this memory then keeps `raw` itself alive, and not what it is a view of.
        if column in TOKEN_COLUMNS:
            return torch.from_numpy(raw).view(_TORCH_TYPES[TOKEN_COLUMNS[column]]).squeeze(1)
        return torch.from_numpy(raw).view(DTYPES[self.dtype])


def bytes_from_tensor(activations: Tensor) -> np.ndarray:
    """`[n, d_in]` on the CPU -> uint8 `[n, d_in * itemsize]` over the same memory."""
    return activations.contiguous().view(torch.uint8).numpy()


def as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bytes, uint8 `[n, d_in * itemsize]`, as float32 `[n, d_in]`, exactly; in numpy, which has no bfloat16."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32, copy=False)


def memory(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, to read from or into."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # numpy declares it from Python 3.12 on
