"""The two sums that sparse steps consist of, beside the encoder's product: of few rows, and over the columns of two rows."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def uses_triton(x: Tensor) -> bool:
    """Whether x goes through the kernels of `gpu.py`: where `SAE_TRITON=1` is set, on a GPU or in Triton's interpreter."""
    if os.environ.get("SAE_TRITON") != "1":
        return False
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def weighted_rows(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """For each bag the sum of its rows, each times its weight: bag i has `indices[offsets[i]:offsets[i + 1]]`. indices, weights
    `[m]`, rows `[r, width]`, offsets `[bags + 1]` -> `[bags, width]`."""
    if uses_triton(rows):
        from components.sae.kernels import gpu

        return gpu.weighted_rows(indices, rows, offsets, weights)
    return embedding_bag(indices, rows, offsets[:-1], per_sample_weights=weights, mode="sum")


def products_of_pairs(rows: Tensor, places: Tensor, others: Tensor, other_places: Tensor) -> Tensor:
    """`rows[places[i]] . others[other_places[i]]`, `[m]`: quickest where places rise and others fit into the cache."""
    if len(places) == 0:
        return rows.new_zeros(0)
    if uses_triton(rows):
        from components.sae.kernels import gpu

        return gpu.products_of_pairs(rows, places, others, other_places)
    # What embedding_bag does for the gradient to its weights, told of bags that are rows.
    start = places.new_zeros(1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, others, other_places, start, places, 0, -1)
