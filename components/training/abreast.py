"""Several coders at once on a CPU: while one small coder waits for a thread of its own, another one computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self, TypeVar

import torch

from components.sae.coder import Coder
from components.sae.kernels.sizes import LARGE

_Value = TypeVar("_Value")
_Result = TypeVar("_Result")
_AT_ONCE = 3


class Abreast:
    """Calls a function for each of several coders, some at the same time where all are small. Each has as many threads as it
    has alone: the bits of a product may depend on their number."""

    def __init__(self, coders: Sequence[Coder], device: torch.device) -> None:
        count, threads = min(_AT_ONCE, len(coders)), torch.get_num_threads()
        pays = device.type == "cpu" and count > 1 and threads > 1 and all(_small(coder) for coder in coders)
        self._pool = ThreadPoolExecutor(count, "coder", torch.set_num_threads, (threads,)) if pays else None

    def each(self, function: Callable[[_Value], _Result], values: Sequence[_Value]) -> list[Callable[[], _Result]]:
        """For each value what gives `function(value)`, or raises what that raised; to be called in this order."""
        if self._pool is None or len(values) < 2:
            return [partial(function, value) for value in values]
        return [self._pool.submit(function, value).result for value in values]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _small(coder: Coder) -> bool:
    return coder.mesh is None and (coder.d_in < LARGE[0] or coder.d_sae < LARGE[1])
