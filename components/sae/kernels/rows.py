"""The two sums that sparse steps consist of, beside the encoder's product: of few rows, and over the columns of two rows."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def uses_triton(x: Tensor) -> bool:
    """Whether x goes through the kernels of `gpu`: on a GPU unless `SAE_TRITON=0` is set, and in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return x.is_cuda and os.environ.get("SAE_TRITON") != "0" and _has_triton()


def always_triton() -> bool:
    """Whether they are taken where they do not pay, too: to try them."""
    return os.environ.get("SAE_TRITON") == "1" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def weighted_rows(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """For each bag the sum of its rows, each times its weight: bag i has `indices[offsets[i]:offsets[i + 1]]`. indices, weights
    `[m]`, rows `[r, width]`, offsets `[bags + 1]` -> `[bags, width]`."""
    if uses_triton(rows):
        from components.sae.kernels.gpu.rows import weighted_rows as on_gpu

        return on_gpu(indices, rows, offsets, weights)
    return embedding_bag(indices, rows, offsets[:-1], per_sample_weights=weights, mode="sum")


def products_of_pairs(rows: Tensor, places: Tensor, others: Tensor, other_places: Tensor) -> Tensor:
    """`rows[places[i]] . others[other_places[i]]`, `[m]`: quickest where places rise and others fit into the cache."""
    if len(places) == 0:
        return rows.new_zeros(0)
    if uses_triton(rows):
        from components.sae.kernels.gpu.rows import products_of_pairs as on_gpu

        return on_gpu(rows, places, others, other_places)
    # What embedding_bag does for the gradient to its weights, told of bags that are rows.
    start = places.new_zeros(1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, others, other_places, start, places, 0, -1)
