"""A map of features: their decoder directions in two dimensions, so that near ones mostly lie together."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

MOST_BY_TSNE = 5_000
"""Directions that t-SNE arranges, in seconds for a thousand; UMAP, which is compiled first, takes half a minute for any number
up to here and then about a second for a thousand."""
MOST_BY_UMAP = 200_000
"""More are projected on their two principal components."""
_NEIGHBOURS = 15
_ITERATIONS = 500
_PERPLEXITY = 30.0

logger = logging.getLogger(__name__)


def layout(rows: Tensor, living: Tensor) -> np.ndarray:
    """rows `[d_sae, d_out]`, living `[d_sae]` -> float32 `[d_sae, 2]`, each coordinate from -1 to 1; NaN for features that do
    not fire. The same rows give the same map on one machine.

    t-SNE on unit rows (van der Maaten & Hinton 2008), of many UMAP (McInnes et al. 2018), both started from the principal
    components; or those alone.
    """
    places = np.full((len(rows), 2), np.nan, dtype=np.float32)
    units = torch.nn.functional.normalize(rows[living].float().cpu(), dim=1).numpy()
    count = len(units)
    if count == 0:
        return places
    found = _principal(units)
    if 3 < count <= MOST_BY_TSNE:
        from sklearn.manifold import TSNE

        begun = found / max(float(found[:, 0].std()), 1e-12) * 1e-4
        perplexity = min(_PERPLEXITY, (count - 1) / 3)
        found = TSNE(init=begun, perplexity=perplexity, max_iter=_ITERATIONS, random_state=0).fit_transform(units)
    elif MOST_BY_TSNE < count <= MOST_BY_UMAP:
        found = _by_umap(units, found)
    span = float(np.abs(found).max())
    places[living.cpu().numpy()] = found / span if span > 0 else found
    return places


def _by_umap(units: np.ndarray, begun: np.ndarray) -> np.ndarray:
    try:
        from umap import UMAP
    except RuntimeError as error:  # numba, where it may write what it compiles nowhere
        logger.warning("interpret: the map is of principal components, as UMAP cannot be compiled here: %s", error)
        return begun
    begun = 10 * begun / max(float(np.abs(begun).max()), 1e-12)
    found: np.ndarray = UMAP(n_neighbors=_NEIGHBOURS, init=begun, random_state=0, n_jobs=1).fit_transform(units)
    return found


def _principal(units: np.ndarray) -> np.ndarray:
    """On the two principal components, `[n, 2]`, each turned so that its largest entry is positive."""
    centred = units.astype(np.float64) - units.mean(axis=0, dtype=np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    found = np.zeros((len(units), 2), dtype=np.float32)
    found[:, : axes.shape[1]] = centred @ axes
    return found
