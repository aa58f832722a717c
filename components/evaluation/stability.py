"""Feature stability: which features of one coder are there again in another, by the directions that they write.

Of both coders only the features that fire on their evaluation's tokens take part. A feature has persisted where it and one of
the other coder are each other's nearest (mutual nearest neighbours of decoder cosine) and the cosine is over 0.7, as in
arXiv 2501.16615, where two seeds share about a third. What is left of the later coder is `split` (its nearest of the earlier
one is over 0.7, and has a nearer one) or `new`; what is left of the earlier one is `merged`, likewise, or `vanished`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from components.interop.saelens import WEIGHTS_NAME

SAME_COSINE = 0.7
FILES = (WEIGHTS_NAME, "features.parquet")
"""Of a coder's artifact: what a `Dictionary` is read from."""
COUNTS = ("persisted", "split", "new", "merged", "vanished")
SHARES = ("persisted_share", "persisted_share_by_reconstruction", "kept_share", "kept_share_by_reconstruction")
_ENTRIES_AT_ONCE = 2**25
"""Cosines in memory at a time: 128 MiB."""


@dataclass(frozen=True)
class Dictionary:
    """A coder's features."""

    rows: Tensor
    """What they write, `[d_sae, d_out]`."""
    density: np.ndarray
    """Share of the evaluation's tokens on which each fires, `[d_sae]`."""
    weight: np.ndarray
    """Mean length that each adds to the reconstruction, over all tokens, `[d_sae]`, in units of the activations."""

    @classmethod
    def read(cls, folder: Path) -> Dictionary:
        """From the files of an artifact on this machine."""
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            rows = file.get_tensor("W_dec")
        table = pq.read_table(folder / "features.parquet", columns=["density", "mean_activation"])
        density, activation = (table[name].to_numpy() for name in ("density", "mean_activation"))
        return cls(rows, density, density * activation * rows.norm(dim=1).numpy())


@dataclass(frozen=True)
class Nearest:
    """Of each row of one side the nearest of the other: its place and the cosine, `[m]` each."""

    places: np.ndarray
    cosines: np.ndarray


def nearest_across(first: Tensor, second: Tensor) -> tuple[Nearest, Nearest]:
    """For each row of `first` `[m, d]` its nearest of `second` `[n, d]`, and the other way round.

    In blocks: a bounded number of cosines stands in memory, and never `m x n`.
    """
    first, second = (torch.nn.functional.normalize(rows.float(), dim=1) for rows in (first, second))
    places = torch.zeros(len(first), dtype=torch.long)
    cosines = torch.full((len(first),), -torch.inf)
    back_places = torch.zeros(len(second), dtype=torch.long)
    back_cosines = torch.full((len(second),), -torch.inf)
    block = max(1, _ENTRIES_AT_ONCE // max(1, len(second)))
    for start in range(0, len(first), block):
        products = first[start : start + block] @ second.T
        if products.numel() == 0:
            break
        cosines[start : start + block], places[start : start + block] = products.max(dim=1)
        best, where = products.max(dim=0)
        nearer = best > back_cosines
        back_cosines[nearer], back_places[nearer] = best[nearer], start + where[nearer]
    return Nearest(places.numpy(), cosines.numpy()), Nearest(back_places.numpy(), back_cosines.numpy())


def compare(later: Dictionary, earlier: Dictionary) -> tuple[dict[str, Any], pa.Table]:
    """Counts and shares, and a row for each feature that fires.

    `persisted_share`: of the later coder's firing features; `kept_share`: of the earlier one's; `..._by_reconstruction`: each
    counted by `Dictionary.weight`; None where nothing fires. The table's `side` is `version` or `champion`, `nearest` the
    feature of the other side, None where that has none.
    """
    here, there = np.flatnonzero(later.density > 0), np.flatnonzero(earlier.density > 0)
    forth, back = nearest_across(later.rows[torch.from_numpy(here)], earlier.rows[torch.from_numpy(there)])
    sides = (
        _side("version", later, here, there, forth, back, "split", "new"),
        _side("champion", earlier, there, here, back, forth, "merged", "vanished"),
    )
    table = pa.concat_tables(sides)
    statuses = table["status"].to_numpy(zero_copy_only=False)
    counts = {name: int((statuses == name).sum()) for name in COUNTS}
    counts["persisted"] //= 2  # a row on each side
    shares = {}
    for name, side in (("persisted_share", sides[0]), ("kept_share", sides[1])):
        persisted = side["status"].to_numpy(zero_copy_only=False) == "persisted"
        shares[name] = _share(persisted, np.ones(len(persisted)))
        shares[f"{name}_by_reconstruction"] = _share(persisted, side["weight"].to_numpy())
    return {**counts, **shares, "firing": len(here), "champion_firing": len(there)}, table


def _side(
    side: str, own: Dictionary, here: np.ndarray, there: np.ndarray, forth: Nearest, back: Nearest, near: str, far: str
) -> pa.Table:
    """here, there: numbers of the features that fire, which `forth` and `back` count from 0."""
    if len(here) and len(there):
        over = forth.cosines > SAME_COSINE
        mutual = over & (back.places[forth.places] == np.arange(len(here)))
        status = np.where(mutual, "persisted", np.where(over, near, far))
        nearest, cosine = pa.array(there[forth.places]), pa.array(forth.cosines)
    else:
        status = np.full(len(here), far)
        nearest, cosine = pa.nulls(len(here), pa.int64()), pa.nulls(len(here), pa.float32())
    return pa.table(
        {
            "side": pa.array([side] * len(here), pa.string()),
            "feature": pa.array(here, pa.int64()),
            "status": pa.array(status.tolist(), pa.string()),
            "nearest": nearest.cast(pa.int64()),
            "cosine": cosine.cast(pa.float32()),
            "density": own.density[here],
            "weight": own.weight[here],
        }
    )


def _share(chosen: np.ndarray, weight: np.ndarray) -> float | None:
    total = float(weight.sum())
    return float(weight[chosen].sum()) / total if total > 0 else None
