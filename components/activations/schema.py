"""The columns of an activation dataset, and the way between Arrow and torch without a copy.

One row is one token: `document` int64, `position` int32 (token index in the document), `token` int32, and for each hook
point a fixed-size binary of `d_in * itemsize` bytes. (Fixed-size lists of float16 were measured 4 to 12 times slower.)
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TOKEN_BYTES = 8 + 4 + 4
"""Bytes that a row takes besides its activations."""


def dataset_schema(hook_points: dict[str, int], dtype: str) -> pa.Schema:
    """The schema for hook points of given widths `d_in`."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in _TOKEN_FIELDS.items()]
    for name, width in hook_points.items():
        metadata = {"dtype": dtype, "shape": f"[{width}]", "hook_point": name}
        fields.append(pa.field(name, pa.binary(width * DTYPES[dtype].itemsize), nullable=False, metadata=metadata))
    return pa.schema(fields)


def rows_from_tensor(activations: Tensor) -> pa.Array:
    """`[n, d_in]` -> a fixed-size binary array over the same memory."""
    raw = activations.contiguous().view(torch.uint8).numpy()
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(raw.shape[1]), len(raw), [None, pa.py_buffer(raw)])


def tensor_from_rows(column: pa.ChunkedArray | pa.Array, dtype: str) -> Tensor:
    """A fixed-size binary column -> `[n, d_in]`, over the same memory where the column is one chunk."""
    raw = bytes_from_rows(column)
    return torch.from_numpy(raw).view(DTYPES[dtype])


def bytes_from_rows(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A fixed-size binary column -> uint8 `[n, byte_width]`."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = array.type.byte_width
    if len(array) == 0:
        return np.empty((0, width), dtype=np.uint8)
    return np.asarray(_Memory(array.buffers()[1], array.offset * width, (len(array), width)))


class _Memory:
    """An Arrow buffer as numpy sees it. (`np.frombuffer` would mark it read-only, of which torch warns each time;
    nothing here writes to it.)"""

    def __init__(self, buffer: pa.Buffer, offset: int, shape: tuple[int, int]) -> None:
        self.buffer = buffer  # numpy keeps this object, and so the buffer, alive
        self.__array_interface__ = {
            "shape": shape, "typestr": "|u1", "data": (buffer.address + offset, False), "version": 3
        }  # fmt: skip


_TOKEN_FIELDS = {"document": pa.int64(), "position": pa.int32(), "token": pa.int32()}
