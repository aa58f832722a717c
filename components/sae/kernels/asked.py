"""Questions to a GPU whose answers are not waited for at once."""

from __future__ import annotations

import torch
from torch import Tensor


class Asked:
    """How many entries of a mask are true: asked when this is made, and waited for where it is wanted. A GPU has other work to
    do in between, and does not stand still for the answer."""

    def __init__(self, mask: Tensor) -> None:
        count = mask.sum()
        if count.is_cuda:
            self._count = torch.empty((), dtype=count.dtype, pin_memory=True).copy_(count, non_blocking=True)
            self._there: torch.cuda.Event | None = torch.cuda.Event()
            self._there.record()
        else:
            self._count, self._there = count, None

    def answer(self) -> int:
        if self._there is not None:
            self._there.synchronize()
        return int(self._count)
