"""Checks of the GPU's kernels against float64: `gpu.py` runs them, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from components.sae.auxiliary import auxk_loss, auxk_loss_of
from components.sae.kernels.selection import strongest_of_batch, strongest_of_rows
from components.sae.kernels.sparse import Places, decoded, encoded
from components.training.optimizer import update

LIMIT = 1e-3
"""Of the relative error against float64."""
Row = dict[str, Any]
Shape = tuple[int, int, int, int]
"""Tokens, d_in, d_sae, k."""


def topk_step(x: Tensor, weights: list[Tensor], k: int, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, pre-activations `[n, k]` and indices of a TopK coder, ranked by length: W_enc, b_enc, W_dec, b_dec."""
    W_enc, b_enc, W_dec, b_dec = weights
    norms = W_dec.norm(dim=1).detach()
    offsets = torch.arange(len(x) + 1, device=x.device) * k
    if sparse:
        found, indices = strongest_of_rows(x, W_enc, b_enc, norms, k)
        places = Places.of(indices.flatten(), offsets, len(b_enc))
        before = encoded(x, W_enc, b_enc, found.flatten(), places)
        written = decoded(torch.relu(before), W_dec, places) + b_dec
    else:
        every = torch.nn.functional.linear(x, W_enc.T, b_enc)
        with torch.no_grad():
            indices = (torch.relu(every) * norms).topk(k, dim=1, sorted=False).indices
        before = every.gather(1, indices).flatten()
        written = torch.nn.functional.embedding_bag(
            indices.flatten(), W_dec, offsets[:-1], per_sample_weights=torch.relu(before).to(W_dec.dtype), mode="sum"
        )
        written = written + b_dec
    return (x.float() - written.float()).square().sum(dim=1).mean(), before.reshape(len(x), k), indices


def drawn(d_in: int, d_sae: int, device: torch.device) -> list[Tensor]:
    """W_enc (feature by feature in memory), b_enc, W_dec, b_dec."""
    random = torch.Generator().manual_seed(1)
    shapes = ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))
    made = [torch.randn(shape, generator=random) * d_in**-0.5 for shape in shapes]
    made[0] = made[0].T
    return [tensor.to(device).requires_grad_() for tensor in made]


def checks(device: torch.device, shape: Shape) -> list[Row]:
    """Each output and gradient against a dense float64 step with the same features; features against a float64 order."""
    n, d_in, d_sae, k = shape
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(2)).to(device)
    weights = drawn(d_in, d_sae, device)
    loss, before, indices = topk_step(x, weights, k, sparse=True)
    loss.backward()
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    W_enc, b_enc, W_dec, b_dec = exact
    every = x.double() @ W_enc + b_enc
    strengths = torch.relu(every) * W_dec.norm(dim=1).detach()
    values = torch.relu(every.gather(1, indices))
    dense = torch.zeros_like(every).scatter(1, indices, values)
    expected = (x.double() - dense @ W_dec - b_dec).square().sum(dim=1).mean()
    expected.backward()
    weakest, kth = strengths.gather(1, indices).amin(dim=1), strengths.topk(k, dim=1).values[:, -1]
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "weakest chosen strength": (weakest, kth),
        "pre-activations": (before, every.gather(1, indices)),
        "loss": (loss, expected),
    }
    names = ("encoder gradient", "encoder bias gradient", "decoder gradient", "decoder bias gradient")
    for name, weight, reference in zip(names, weights, exact, strict=True):
        assert weight.grad is not None
        assert reference.grad is not None
        pairs[name] = (weight.grad, reference.grad)
    found = [compared(name, *pair) for name, pair in pairs.items()]
    distinct = bool((indices.sort(dim=1).values.diff(dim=1) > 0).all())
    found.append({"check": "no feature twice", "error": 0.0 if distinct else 1.0, "passed": distinct})
    return [{**row, "shape": shape} for row in found]


def auxk_checks(device: torch.device) -> list[Row]:
    """AuxK, with fewer dead features than take part in it, and with more."""
    n, d_in, d_sae, k = 20, 40, 128, 8
    random = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(n, d_in, generator=random).to(device) for _ in range(2))
    found = []
    for count in (0, 5, 70):
        dead = torch.arange(d_sae, device=device) < count
        W_enc, b_enc, W_dec, _ = weights = drawn(d_in, d_sae, device)
        named = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "d_sae": d_sae}
        coder: Any = SimpleNamespace(**named, mesh=None, read_bias=lambda bias: bias)  # which needs no pydantic
        loss = auxk_loss_of(coder, x, None, dead, residual, k)
        exact = [weight.detach().double().requires_grad_() for weight in weights]
        expected = auxk_loss(x.double() @ exact[0] + exact[1], dead, residual, exact[2], k)
        expected.backward()
        if loss.requires_grad:
            loss.backward()
        found.append(compared(f"AuxK loss, {count} dead", loss, expected))
        for name, weight, reference in zip(("W_enc", "b_enc", "W_dec"), weights, exact, strict=False):
            value = torch.zeros_like(weight) if weight.grad is None else weight.grad
            assert reference.grad is not None
            found.append(compared(f"AuxK gradient to {name}, {count} dead", value, reference.grad))
    return found


def compared(name: str, value: Tensor, exact: Tensor) -> Row:
    error = ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    return {"check": name, "error": error, "passed": error <= LIMIT}


def selection_checks(device: torch.device, shape: Shape) -> list[Row]:
    """The product with the selection behind it, of operands in half precision (float16 in the interpreter, which has no
    bfloat16), and the strongest of a whole batch."""
    from components.sae.kernels.gpu import selection

    n, d_in, d_sae, k = shape
    half = torch.float16 if selection.INTERPRETED else torch.bfloat16
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(4)).to(device)
    W_enc, b_enc, W_dec, _ = (weight.detach() for weight in drawn(d_in, d_sae, device))
    norms = W_dec.norm(dim=1)
    values, indices = selection.strongest_of_rows(x.to(half), W_enc.T.to(half), b_enc, norms, k)
    every = x.to(half).double() @ W_enc.to(half).double() + b_enc
    strengths = every * norms
    kth = strengths.topk(k, dim=1).values[:, -1]
    found = [
        compared(f"{half}: pre-activations", values, every.gather(1, indices)),
        compared(f"{half}: weakest chosen strength", strengths.gather(1, indices).amin(dim=1), kth),
    ]
    before, places, weakest = strongest_of_batch(x, W_enc, b_enc, norms, k)
    every = x.double() @ W_enc.double() + b_enc
    strengths = (torch.relu(every) * norms).flatten()
    expected = strengths.topk(n * k).values[-1]
    found += [
        compared("of the batch: pre-activations", before, every.flatten()[places]),
        compared("of the batch: weakest chosen strength", weakest, expected),
        compared("of the batch: chosen strengths", strengths[places].sum(), strengths.topk(n * k).values.sum()),
    ]
    return [{**row, "shape": shape} for row in found]


def uneven_checks(device: torch.device) -> list[Row]:
    """A feature that fires on every token, one that fires on none: their gradients are summed in many pieces, or none."""
    n, width, d_sae = 300, 48, 64
    random = torch.Generator().manual_seed(5)
    indices = torch.stack([torch.zeros(n, dtype=torch.long), torch.randint(2, d_sae, (n,), generator=random)], dim=1).to(device)
    read = torch.randn(n, width, generator=random).to(device)
    weights = torch.randn(2 * n, generator=random).to(device)
    places = Places.of(indices.flatten(), torch.arange(n + 1, device=device) * 2, d_sae)
    tokens = torch.arange(n, device=device).repeat_interleave(2)
    expected = torch.zeros(d_sae, width, dtype=torch.float64, device=device)
    expected.index_add_(0, indices.flatten(), weights.double()[:, None] * read.double()[tokens])
    return [compared("sums of uneven features", places.sums(read, weights), expected)]


def adam_checks(device: torch.device) -> list[Row]:
    """Three steps, of which the second is a bad one, and clipping, against the formulas (Kingma & Ba 2015) in float64."""
    random = torch.Generator().manual_seed(6)
    weight = torch.nn.Parameter(torch.randn(1 << 20, generator=random).to(device).reshape(1024, 1024).T)
    optimizer = torch.optim.Adam([weight], lr=0.0, betas=(0.8, 0.99), fused=True)
    exact, first, second, steps = weight.detach().double(), 0.0, 0.0, 0
    for number in range(3):
        gradient = torch.randn(1024, 1024, generator=random).to(device)
        weight.grad = gradient.clone()
        bad = torch.tensor(number == 1, device=device)
        update(optimizer, 1e-2, gradient.norm(), 500.0, bad, half=True)
        if number == 1:
            continue
        steps += 1
        scaled = gradient.double() * min(1.0, 500.0 / (gradient.double().norm().item() + 1e-6))
        first, second = 0.8 * first + 0.2 * scaled, 0.99 * second + 0.01 * scaled**2
        exact -= 1e-2 * (first / (1 - 0.8**steps)) / ((second / (1 - 0.99**steps)).sqrt() + 1e-8)
    return [compared("Adam", weight.detach(), exact)]


def all_checks(device: torch.device) -> list[Row]:
    """Small shapes, which the interpreter can do."""
    small: list[Shape] = [(35, 40, 96, 5), (17, 64, 128, 16)]
    found = [row for shape in small for row in checks(device, shape) + selection_checks(device, shape)]
    return found + auxk_checks(device) + uneven_checks(device) + adam_checks(device)
