"""One row per feature: how often and how strongly it fires, and which features point the same way."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from components.sae.features import Features

_ENTRIES_AT_ONCE = 2**25


class FeatureSums:
    """Sums over counted tokens, each `[d_sae]`."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """Tokens on which the feature fired."""
        self.activation = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.largest = torch.zeros(d_sae, dtype=torch.float32, device=device)

    def add(self, features: Features) -> Tensor:
        """Those of n tokens; returns how many fire on each token, `[n]`."""
        self.tokens += len(features)
        self.fired += features.fired()
        self.activation += features.sums()
        self.largest = torch.maximum(self.largest, features.largest())
        return features.active()

    def on_cpu(self) -> FeatureSums:
        """The same sums where they can be sent to another process."""
        copy = FeatureSums(len(self.fired), torch.device("cpu"))
        copy.include(self)
        return copy

    def include(self, other: FeatureSums) -> None:
        """Add the sums over other tokens."""
        self.tokens += other.tokens
        self.fired += other.fired.to(self.fired.device)
        self.activation += other.activation.to(self.activation.device)
        self.largest = torch.maximum(self.largest, other.largest.to(self.largest.device))

    @property
    def dead_fraction(self) -> float:
        return (self.fired == 0).double().mean().item()


def feature_table(sums: FeatureSums, decoder: Tensor | None, neighbours: int) -> pa.Table:
    """density (share of tokens), mean activation where it fires, largest activation, whether it is dead; with a decoder
    `[d_sae, d_in]` also the norm of its row and the `neighbours` features of the nearest direction with their cosines."""
    fired, activation = sums.fired.cpu().numpy(), sums.activation.cpu().numpy()
    columns: dict[str, object] = {
        "feature": np.arange(len(fired), dtype=np.int64),
        "density": fired / sums.tokens,
        "mean_activation": np.divide(activation, fired, out=np.zeros_like(activation), where=fired > 0),
        "max_activation": sums.largest.cpu().numpy(),
        "dead": fired == 0,
    }
    if decoder is not None:
        decoder = decoder.detach()
        columns["decoder_norm"] = decoder.float().norm(dim=1).cpu().numpy()
        count = min(neighbours, len(decoder) - 1)
        if count > 0:
            ids, cosines = nearest_rows(decoder, count)
            columns["neighbours"] = pa.FixedSizeListArray.from_arrays(pa.array(ids.astype(np.int32).ravel()), count)
            columns["neighbour_cosines"] = pa.FixedSizeListArray.from_arrays(pa.array(cosines.ravel()), count)
    return pa.table(columns)


def nearest_rows(rows: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row `[m, d]` the ids `[m, count]` and cosines of the others of nearest direction, nearest first.

    In blocks: memory is a bounded number of cosines at a time and not `m x m`.
    """
    units = torch.nn.functional.normalize(rows.float(), dim=1)
    block = max(1, _ENTRIES_AT_ONCE // len(units))
    ids, cosines = [], []
    for start in range(0, len(units), block):
        products = units[start : start + block] @ units.T
        itself = torch.arange(len(products), device=products.device)
        products[itself, start + itself] = -torch.inf
        best = products.topk(count, dim=1)
        ids.append(best.indices.cpu().numpy())
        cosines.append(best.values.cpu().numpy())
    return np.concatenate(ids), np.concatenate(cosines)
