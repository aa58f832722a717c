"""A coder's share of the features: which part of each tensor that is, taken from a whole or from files of shares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from components.sae.coder import Coder
from components.sae.mesh import Mesh

_OF_ALL = ("b_dec", "W_skip")
"""Parameters that every share has whole."""


@dataclass(frozen=True)
class Share:
    """One of `count` equal shares of the features."""

    number: int
    count: int

    @classmethod
    def of(cls, mesh: Mesh | None) -> Share:
        return cls(0, 1) if mesh is None else cls(mesh.feature_rank, mesh.features)

    def bounds(self, d_sae: int) -> tuple[int, int]:
        """The first of all features that it has, and the one after its last."""
        return d_sae * self.number // self.count, d_sae * (self.number + 1) // self.count


def feature_dimension(name: str, shape: Sequence[int], d_sae: int) -> int | None:
    """Along which dimension a tensor of `CoderInTraining.tensors` or of a state dict has the `d_sae` features; None where every
    share has all of it."""
    last = name.rsplit(".", 1)[-1]
    if last == "W_enc" and len(shape) == 2:
        return 1
    return 0 if last not in _OF_ALL and len(shape) > 0 and shape[0] == d_sae else None


@torch.no_grad()
def take_share(share: Coder, whole: Coder) -> None:
    """Weights and buffers of a whole coder into one that holds a share of its features."""
    first, stop = Share.of(share.mesh).bounds(whole.d_sae)
    own = share.state_dict()
    for name, value in whole.state_dict().items():
        dimension = feature_dimension(name, value.shape, whole.d_sae)
        own[name].copy_(value if dimension is None else value.narrow(dimension, first, stop - first))


def read_share(paths: Sequence[Path], share: Share) -> dict[str, Tensor]:
    """The tensors of a share from the files of all shares, in their order and of any number of them; nothing else is read."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        widths = [file.get_slice("silent_tokens").get_shape()[0] for file in files]
        first, stop = share.bounds(sum(widths))
        found: dict[str, Tensor] = {}
        for name in files[0].keys():  # noqa: SIM118  # no mapping
            dimension = feature_dimension(name, files[0].get_slice(name).get_shape(), widths[0])
            if dimension is None:
                found[name] = files[0].get_tensor(name)
                continue
            parts, begin = [], 0
            for file, width in zip(files, widths, strict=True):
                low, high = max(first - begin, 0), min(stop - begin, width)
                if low < high:
                    part = file.get_slice(name)
                    parts.append(part[low:high] if dimension == 0 else part[:, low:high])
                begin += width
            found[name] = torch.cat(parts, dim=dimension)
    return found
