"""What an SAE has to beat: reconstructions that anybody has for nothing, with as many numbers per token as the SAE's L0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.evaluation.reference import Reference

RANDOM_SEED = 0


@dataclass(frozen=True)
class Rows:
    """Counted tokens of a batch: activations where they are replaced, `[n, d]`, and what the coder reads, which an autoencoder
    does there too, `[n, d_in]`; MLP neurons `[n, d_mlp]` where they were kept."""

    x: Tensor
    read: Tensor
    neurons: Tensor | None


@dataclass(frozen=True)
class Reconstruction:
    """x_hat `[n, d_in]` and, per token, how many numbers other than zero it is made of `[n]`."""

    x_hat: Tensor
    active: Tensor


Variant = Callable[[Rows], Reconstruction]


def zero(rows: Rows) -> Reconstruction:
    return Reconstruction(torch.zeros_like(rows.x), _none_active(rows.x))


def constant(value: Tensor) -> Variant:
    """The same vector `[d_in]` for every token."""
    return lambda rows: Reconstruction(value.to(rows.x).expand_as(rows.x), _none_active(rows.x))


def principal_components(reference: Reference, count: int) -> Variant:
    """The mean and the `count` directions in which training activations vary most: the best linear code of that size."""
    _, vectors = torch.linalg.eigh(reference.covariance)
    directions = vectors[:, -count:].to(reference.mean)

    def reconstruct(rows: Rows) -> Reconstruction:
        mean, basis = reference.mean.to(rows.x), directions.to(rows.x)
        coordinates = (rows.x - mean) @ basis
        return Reconstruction(mean + coordinates @ basis.T, torch.full_like(rows.x[:, 0], basis.shape[1]))

    return reconstruct


def random_directions(reference: Reference, features: int, count: int) -> Variant:
    """An untrained dictionary: of `features` random unit directions each token takes the `count` that it points along most.

    One scale for all, the one that fits training activations best, keeps overlapping directions from overshooting.
    Drawn on the CPU, so that every device has the same ones.
    """
    rows = unit_rows(features, reference.d_in).to(reference.mean)

    def code(centred: Tensor) -> Tensor:
        return largest_of(torch.relu(centred @ rows.to(centred).T), count)

    sample = reference.sample - reference.mean
    rebuilt = (code(sample) @ rows).double()  # a float32 sum would depend on the number of threads, in the seventh digit
    scale = (sample.double() * rebuilt).sum() / rebuilt.square().sum().clamp_min(torch.finfo(rebuilt.dtype).tiny)

    def reconstruct(given: Rows) -> Reconstruction:
        mean = reference.mean.to(given.x)
        chosen = code(given.x - mean)
        return Reconstruction(mean + scale.to(mean) * (chosen @ rows.to(mean)), (chosen > 0).sum(dim=1))

    return reconstruct


def neurons(reference: Reference, output: nn.Module | None, count: int) -> Variant:
    """The model's own basis: the `count` neurons that add most to the MLP's output, each with what it adds; where the hook
    point is no MLP output, the `count` coordinates that differ most from their mean."""

    def coordinates(rows: Rows) -> Reconstruction:
        mean = reference.mean.to(rows.x)
        chosen = largest_of(rows.x - mean, count)
        return Reconstruction(mean + chosen, (chosen != 0).sum(dim=1))

    if output is None:
        return coordinates
    weight = output.weight
    assert isinstance(weight, Tensor)
    # Linear holds [d_in, d_mlp], GPT-2's Conv1D [d_mlp, d_in].
    lengths = weight.float().norm(dim=0 if isinstance(output, nn.Linear) else 1)

    def reconstruct(rows: Rows) -> Reconstruction:
        assert rows.neurons is not None
        chosen = largest_of(rows.neurons, count, lengths.to(rows.neurons))
        return Reconstruction(output(chosen).to(rows.x), (chosen != 0).sum(dim=1))

    return reconstruct


def unit_rows(count: int, width: int) -> Tensor:
    """Random directions, float32 `[count, width]`, always the same ones."""
    # The type is given since another thread that loads a model changes the default one meanwhile.
    seeded = torch.Generator().manual_seed(RANDOM_SEED)
    drawn = torch.randn(count, width, generator=seeded, dtype=torch.float32)
    return drawn / drawn.norm(dim=1, keepdim=True)


def largest_of(values: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """`[n, m]` with all but the `count` entries of largest magnitude (times weight `[m]`) of each row set to zero."""
    magnitudes = values.abs() if weights is None else values.abs() * weights
    places = magnitudes.topk(min(count, values.shape[1]), dim=1).indices
    return torch.zeros_like(values).scatter(1, places, values.gather(1, places))


def _none_active(x: Tensor) -> Tensor:
    return torch.zeros_like(x[:, 0])
