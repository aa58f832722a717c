"""Meta-structure: how much of what the features write is made of a few directions that many of them share.

A small dictionary is trained on the decoder's rows (unit length, of features that fire), as Leask et al. 2025 train meta-SAEs
(arXiv 2502.04878): what it explains with k meta-features a row says how far features are compositions of others. Directions
that have nothing in common are explained to some degree, too, since the dictionary is fitted to the rows that it is measured
on; so the same is done with as many random rows, and only the distance to those says anything.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from components.evaluation import intervals as bootstrap
from components.evaluation.baselines import RANDOM_SEED, unit_rows
from components.evaluation.features import nearest_rows
from components.evaluation.record import Metrics
from components.evaluation.settings import MetaStructureSettings
from components.sae.architectures.topk import TopKSAE, TopKSettings
from components.sae.coder import Progress


def meta_structure(rows: Tensor, settings: MetaStructureSettings) -> Metrics:
    """rows `[m, d]`: what the features that fire write -> `explained_variance` by the meta-dictionary and the mean
    `nearest_cosine`, each with its 95% interval over features, and both of random rows (`random_...`)."""
    metrics: Metrics = {"features": len(rows), "meta_features": max(settings.k, math.ceil(settings.width_ratio * len(rows)))}
    if len(rows) < 2:
        return metrics
    units = torch.nn.functional.normalize(rows.detach().float(), dim=1)
    chance = unit_rows(len(units), units.shape[1]).to(units.device)
    for prefix, some in (("", units), ("random_", chance)):
        rebuilt = _rebuilt(some, int(metrics["meta_features"] or 1), settings)
        table = np.stack(
            [
                (some - rebuilt).double().square().sum(dim=1).cpu().numpy(),
                (some - some.mean(dim=0)).double().square().sum(dim=1).cpu().numpy(),
                nearest_rows(some, 1)[1][:, 0].astype(np.float64),
                np.ones(len(some)),
            ],
            axis=1,
        )
        found = _metrics(table.sum(axis=0), np.zeros(0))
        bounds = bootstrap.intervals(table, np.zeros((len(table), 0)), _metrics)
        for name, value in found.items():
            metrics[f"{prefix}{name}"] = float(value)
            low, high = bounds[name] or (None, None)
            metrics |= {f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
    return metrics


def _metrics(sums: np.ndarray, _: np.ndarray) -> dict[str, np.ndarray]:
    """sums `[..., 4]`: squared error, squared distance to the mean row, nearest cosine, rows."""
    return {"explained_variance": 1 - sums[..., 0] / sums[..., 1], "nearest_cosine": sums[..., 2] / sums[..., 3]}


def _rebuilt(rows: Tensor, width: int, settings: MetaStructureSettings) -> Tensor:
    """Rows `[m, d]` from k of `width` directions that were fitted to them."""
    coder = TopKSAE.autoencoder(TopKSettings(d_sae=width, k=min(settings.k, width)), rows.shape[1]).to(rows)
    coder.initialise(RANDOM_SEED)
    with torch.no_grad():
        coder.b_dec.copy_(rows.mean(dim=0))
        coder.b_enc.copy_(-coder.b_dec @ coder.W_enc)  # it begins with the rows around their mean
    optimizer = torch.optim.Adam(coder.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    silent = torch.zeros(width, dtype=torch.int64, device=rows.device)
    # In float32 whatever another thread that loads a model makes the default, and with gradients whoever calls.
    with torch.enable_grad():
        for step in range(settings.steps):
            size = min(settings.batch_size, len(rows))
            batch = rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)]
            dead = silent > settings.steps // 20
            losses = coder.losses(batch, batch, Progress(step, settings.steps, dead))
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            optimizer.step()
            silent = torch.where(losses.features.fired() > 0, 0, silent + 1)
    with torch.no_grad():
        return coder.reconstruct(rows)[1]
