"""What differs between two language models, feature by feature of a crosscoder of both (Minder et al. 2025, arXiv 2504.02922).

That a feature writes to one model alone may be the crosscoder's doing: the other model may hold it where nothing of the
crosscoder reconstructs it ("complete shrinkage"), or under other features ("latent decoupling"). So each feature's direction in
the model that it belongs to is scaled until it fits the other model's activations best. Lengths are those of training: each
model's activations are scaled to a mean squared norm of their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from components.activations.dataset.forward import counted_tokens
from components.activations.exclusion import Exclusion
from components.evaluation.held_out import HeldOut, right_padded
from components.evaluation.record import Metrics, Row
from components.language_model.hook_points import HookPoint, capture
from components.sae.coder import Coder

ONLY, SHARED = 0.1, (0.4, 0.6)
"""Of the relative norm: up to 0.1 the feature is the first model's, from 0.9 the second's, and between these bounds both's."""
SPECIFIC = {"nu_error": 0.2, "nu_reconstruction": 0.5}
"""Under these a feature of one model is really none of the other's (the paper's)."""
SIDES = ("first", "second", "shared", "between")
_ENTRIES_AT_ONCE = 1 << 25


class Scalings:
    """Sums over tokens from which the scalings follow in closed form. `d` and `y` are rows and targets of one column each."""

    def __init__(self, coder: Coder) -> None:
        """coder: of two columns of the same width."""
        width = coder.writes[0].width
        self._coder, self._columns = coder, (slice(0, width), slice(width, 2 * width))
        self._rows = [coder.W_dec[:, column].detach() for column in self._columns]
        device = coder.W_dec.device
        self.tokens = 0
        self.norms = torch.zeros(2, dtype=torch.float64, device=device)
        """Sum of `||x||^2` in each column."""
        self.strength = torch.zeros(coder.d_sae, dtype=torch.float64, device=device)
        """`sum f^2`"""
        self.products = torch.zeros(2, 2, 2, coder.d_sae, dtype=torch.float64, device=device)
        """`sum f <d, y>`: by what y is (reconstruction, error), y's column, d's column."""

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Activations of both columns side by side, `[n, 2 width]`."""
        for part in x.split(max(1, _ENTRIES_AT_ONCE // self._coder.d_sae)):
            found, written = self._coder.reconstruct(part)
            f = found.dense()
            self.tokens += len(part)
            self.strength += f.double().square().sum(dim=0)
            for number, column in enumerate(self._columns):
                self.norms[number] += part[:, column].double().square().sum()
                for kind, y in enumerate((written[:, column], part[:, column] - written[:, column])):
                    for owner, rows in enumerate(self._rows):
                        self.products[kind, number, owner] += (f * (y @ rows.T)).sum(dim=0, dtype=torch.float64)

    def found(self) -> dict[str, Tensor]:
        """Per feature `[d_sae]`, float64, not a number where it never fired:

        `relative_norm`: 0 where only the first model's row is not zero, 1 where only the second's is, 0.5 for equal ones.
        `nu_reconstruction`, `nu_error`: the scaling for the other model over that for the model in which its row is longer. The
        target is a model's whole reconstruction, or what that is off by without the feature. 0: the other model has none of it;
        1: as much. `decoder_cosine`: of its rows in both.
        """
        scale = (self._rows[0].shape[1] * self.tokens / self.norms).sqrt()
        rows = [part.double() for part in self._rows]
        lengths = torch.stack([length * part.norm(dim=1) for length, part in zip(scale, rows, strict=True)])
        owner = (lengths[1] > lengths[0]).long()
        inner = torch.stack([torch.stack([(one * other).sum(dim=1) for other in rows]) for one in rows])
        # The error is taken with the feature's own part added back: sum f <d, e + f d'> = sum f <d, e> + <d, d'> sum f^2.
        products = self.products.clone()
        products[1] += inner * self.strength
        features = torch.arange(len(owner), device=owner.device)
        fitted = products[:, :, owner, features] * scale[None, :, None]  # its norm and strength cancel in the ratio
        own, other = (fitted[:, column, features] for column in (owner, 1 - owner))
        longest = lengths.amax(dim=0)
        fired = (self.strength > 0) & (longest > 0)
        values = {
            "relative_norm": ((lengths[1] - lengths[0]) / longest + 1) / 2,
            "nu_reconstruction": other[0] / own[0],
            "nu_error": other[1] / own[1],
            "decoder_cosine": torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=1, eps=1e-30),
        }
        return {name: torch.where(fired, value, torch.nan) for name, value in values.items()}


def scalings(
    coder: Coder,
    model: nn.Module,
    points: Sequence[HookPoint],
    text: HeldOut,
    tokens: int,
    exclusion: Exclusion,
    batch_sequences: int,
    device: torch.device,
) -> Scalings:
    """Over the held-out text. points: the two that the coder reads."""
    sums = Scalings(coder)
    for block in text.batches(tokens, batch_sequences):
        block = right_padded(block)
        ids = torch.tensor(block.tokens).to(device).long()
        seen = capture(model, points, {"input_ids": ids})
        counted = torch.tensor(counted_tokens(block, exclusion)).to(device)
        for point, activation in seen.items():
            limit = exclusion.norm_limits.get(str(point))
            if limit is not None:
                counted &= activation.float().norm(dim=-1) <= limit
        sums.add(torch.cat([seen[point][counted].to(coder.W_dec) for point in points], dim=1))
    return sums


def sides(relative_norm: np.ndarray) -> np.ndarray:
    """One of SIDES for each feature, empty where the norm is not a number."""
    low, high = SHARED
    conditions = [
        relative_norm <= ONLY, relative_norm >= 1 - ONLY, (relative_norm >= low) & (relative_norm <= high),
        np.isfinite(relative_norm),
    ]  # fmt: skip
    return np.select(conditions, SIDES, default="")


def summarised(found: dict[str, Tensor], features: pa.Table) -> tuple[Metrics, list[Row], pa.Table]:
    """Counts and medians by name; a row for each side; the feature table with `difference_side` and what was found beside it.

    `specific`: features of one model whose scalings for the other are under `SPECIFIC`.
    """
    values = {name: value.cpu().numpy() for name, value in found.items()}
    side = sides(values["relative_norm"])
    below = np.all([np.abs(values[name]) < limit for name, limit in SPECIFIC.items()], axis=0)
    specific = below & np.isin(side, ("first", "second"))
    metrics: Metrics = {}
    rows: list[Row] = []
    for name in SIDES:
        here = side == name
        row: Row = {"side": name, "features": int(here.sum()), "specific": int((here & specific).sum())}
        row |= {key: float(np.median(value[here])) if here.any() else None for key, value in values.items()}
        rows.append(row)
        metrics[name] = int(here.sum())
        if name in ("first", "second"):
            metrics[f"{name}_specific"] = int((here & specific).sum())
    table = features.append_column("difference_side", pa.array([name or None for name in side.tolist()], pa.string()))
    table = table.append_column("difference_specific", pa.array(specific))
    for key, value in values.items():
        table = table.append_column(key, pa.array(value, from_pandas=True))
    return metrics, rows, table
