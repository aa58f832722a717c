"""Several processes that train one coder: each holds a share of the features, or sees a share of every batch, or both.

The processes are a grid of `data` rows and `features` columns (a DeviceMesh). Those of a row see the same tokens, those of a
column hold the same features. Each computes the loss of the whole: what is summed over features or averaged over tokens is
exchanged on the way forward, and its gradient goes back to each share as it is. What is left for the trainer is to average
gradients over `data`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """The place of this process among those that train a coder together."""

    data: int
    """Shares of a batch."""
    features: int
    """Shares of the features."""
    data_rank: int
    feature_rank: int
    over_data: dist.ProcessGroup
    """The processes with the same features."""
    over_shares: dist.ProcessGroup
    """The processes with the same tokens."""

    @classmethod
    def joined(cls, data: int, features: int, device: torch.device) -> Mesh:
        """Of the processes of the default group, which are `data * features`; neighbours hold different features."""
        mesh = init_device_mesh(device.type, (data, features), mesh_dim_names=("data", "features"))
        row, column = mesh.get_local_rank("data"), mesh.get_local_rank("features")
        return cls(data, features, row, column, mesh.get_group("data"), mesh.get_group("features"))

    @property
    def size(self) -> int:
        return self.data * self.features

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.data_rank == 0 and self.feature_rank == 0

    def over_features(self, share: Tensor) -> Tensor:
        """The sum over the shares of the features, with its gradient."""
        if self.features == 1:
            return share
        total: Tensor = _Sum.apply(share, self.over_shares, 1)
        return total

    def over_tokens(self, share: Tensor) -> Tensor:
        """The mean over the shares of the batch, with its gradient, which the trainer averages."""
        if self.data == 1:
            return share
        mean: Tensor = _Sum.apply(share, self.over_data, self.data)
        return mean

    def any(self, flags: Tensor) -> Tensor:
        """For each flag whether it is set in any share of the batch."""
        if self.data == 1:
            return flags
        found = flags.to(torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX, self.over_data)
        return found.bool()

    def anywhere(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set in any process. No device is waited for."""
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return list(map(bool, found.tolist()))

    def meet(self) -> None:
        """Wait until every process is here."""
        self.anywhere(False)

    @torch.no_grad()
    def among_strongest(self, strengths: Tensor, k: int) -> Tensor:
        """Which of these are among a token's k strongest over all features: `[n, c]` of this share, its own k strongest among
        them, -> bool `[n, c]`. Only they are exchanged."""
        if self.features == 1:
            return torch.ones_like(strengths, dtype=torch.bool)
        if strengths.shape[1] < k:
            own = torch.nn.functional.pad(strengths, (0, k - strengths.shape[1]), value=-torch.inf)
        else:
            own = strengths.topk(k, dim=1, sorted=False).values
        every = _gathered(own.T, self.over_shares, self.features)
        return _kept(strengths.T, every, every.topk(k, dim=0).values[-1], k, self.feature_rank * k).T

    @torch.no_grad()
    def strongest_of_batch(
        self, find: Callable[[int], tuple[Tensor, Tensor, Tensor]], n: int, d_sae: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of this share, what is among the `k` strongest per token of the whole batch: values and places as `find` gives them,
        and the smallest strength among them all that is over zero, 0 where none is.

        find: for c, values, places and strengths of the `c n` strongest of this share, or of those over zero where they are
        fewer. n: tokens, and d_sae: features of this share.
        """
        count = k if self.data == 1 else 2 * k
        while True:
            count = min(count, d_sae)
            values, places, strengths = find(count)
            # Of one kind of length for everybody, where fewer are over zero.
            strengths = torch.nn.functional.pad(strengths, (0, count * n - len(strengths)))
            every = _gathered(strengths, dist.group.WORLD, self.size)
            top = every.topk(min(k * n * self.data, len(every))).values
            # Where tokens of this share take more than twice their part, some may not have been looked at.
            if self.data == 1 or not self.anywhere(count < d_sae and bool(strengths.amin() > top[-1]))[0]:
                break
            count *= 2
        kept = _kept(strengths, every, top[-1], len(top), dist.get_rank() * len(strengths)) & (strengths > 0)
        kept = kept[: len(values)]
        weakest = torch.where(top > 0, top, torch.inf).amin()
        return values[kept], places[kept], torch.where(weakest.isfinite(), weakest, torch.zeros_like(weakest))


class _Sum(torch.autograd.Function):
    """The sum over a group, over a divisor. Everybody goes on with the same sum, so that its gradient is everybody's own."""

    @staticmethod
    def forward(context: Any, share: Tensor, group: dist.ProcessGroup, divisor: int) -> Tensor:
        total = share.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total if divisor == 1 else total / divisor

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def _kept(own: Tensor, every: Tensor, least: Tensor, count: int, before: int) -> Tensor:
    """Which of own `[c, ...]` are among the `count` largest of every `[m, ...]`, the smallest of which is least `[...]`. Of
    equal ones, which repeated tokens and short number formats make, as many as there is place for, by the order of processes.
    before: how many in `every` are of processes before this one."""
    place = count - (every > least).sum(dim=0) - (every[:before] == least).sum(dim=0)
    equal = own == least
    return (own > least) | (equal & (equal.cumsum(dim=0) <= place))


def _gathered(share: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    """`[m, ...]` of each -> `[size m, ...]`"""
    every = share.new_empty(size * len(share), *share.shape[1:])
    dist.all_gather_single(every, share.contiguous(), group=group)
    return every
