"""What the processes that train a coder together exchange after the loss: gradients, whether they are finite, what is shown."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from components.sae.coder import Coder
from components.sae.mesh import Mesh
from components.training.parallel.shares import feature_dimension


def gradient_norm(coder: Coder, losses: Tensor) -> tuple[Tensor, Tensor]:
    """losses `[m]`, and the norm of all gradients, `[]`.

    Where others train the same coder, losses and gradients are averaged over the shares of the batch first, and the norm is
    that of all shares of the features.
    """
    if coder.mesh is None:
        return losses, torch.nn.utils.get_total_norm([one.grad for one in coder.parameters() if one.grad is not None])
    _add_read(coder, coder.mesh)
    mesh, shared, own = coder.mesh, losses.new_zeros(()), losses.new_zeros(())
    for name, parameter in coder.named_parameters():
        if parameter.grad is None:
            # Of a share in which nothing was chosen; the others' part of it counts.
            parameter.grad = torch.zeros_like(parameter)
        _average(parameter.grad, mesh)
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        if feature_dimension(name, parameter.shape, coder.d_sae) is None:
            shared = shared + square
        else:
            own = own + square
    # In one exchange: the squared norm of all shares of features, and the losses of all shares of the batch.
    found = torch.cat([own[None] / mesh.data, losses / mesh.size])
    dist.all_reduce(found)
    return found[1:], (found[0] + shared).sqrt()


def _add_read(coder: Coder, mesh: Mesh) -> None:
    """To the gradient of the decoder bias what the features of all shares learn of it as they read the distance from it."""
    if not coder.subtracts or mesh.features == 1:
        return
    read, coder.read_b_dec = coder.read_b_dec, None
    own = None if read is None else read.grad
    found = mesh.over_features(torch.zeros_like(coder.b_dec) if own is None else own).detach()
    coder.b_dec.grad = found if coder.b_dec.grad is None else coder.b_dec.grad + found


def _average(gradient: Tensor, mesh: Mesh) -> None:
    if mesh.data == 1:
        return
    dense = gradient.T if gradient.dim() == 2 and gradient.T.is_contiguous() else gradient
    sent = dense.contiguous()
    dist.all_reduce(sent, group=mesh.over_data)
    dense.copy_(sent / mesh.data)


def averaged(values: dict[str, Tensor], summed: tuple[str, ...], mesh: Mesh | None) -> dict[str, float]:
    """Numbers `[]` of this process -> of all: their means, and sums over features of those that are `summed`."""
    if mesh is None:
        return {name: value.item() for name, value in values.items()}
    found = torch.stack([value.detach().double() for value in values.values()])
    dist.all_reduce(found)
    means = dict(zip(values, (found / mesh.size).tolist(), strict=True))
    return {name: value * mesh.features if name in summed else value for name, value in means.items()}
