"""Pictures of a run, for the MLflow UI and for the README."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

_LINE = "#4c72b0"
_COLOURS = {"clean": "#55a868", "sae": _LINE, "mean": "#c9c9c9", "zero": "#c9c9c9"}


def training_figure(curves: list[dict[str, float]]) -> Figure:
    """Loss, sparsity and explained variance against tokens."""
    tokens = [point["tokens"] for point in curves]
    panels = (
        ("loss", "loss", "linear"),
        ("explained_variance", "explained variance", "linear"),
        ("l0", "L0 (features per token)", "log"),
        ("dead_fraction", "dead fraction", "linear"),
    )
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (key, title, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.plot(tokens, [point[key] for point in curves], color=_LINE, linewidth=1.2)
        axes.set(title=title, xlabel="tokens", yscale=scale)
        axes.grid(alpha=0.3)
        if key == "dead_fraction":
            axes.set_ylim(0, max(0.01, 1.05 * max(point[key] for point in curves)))
    return figure


def loss_figure(metrics: dict[str, Any]) -> Figure:
    """The four cross-entropies as bars."""
    names = [name for name in ("clean", "sae", "mean", "zero") if metrics[f"ce_loss_{name}"] is not None]
    values = [metrics[f"ce_loss_{name}"] for name in names]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(names, values, color=[_COLOURS[name] for name in names])
    axes.bar_label(bars, fmt="%.3f")
    recovered = metrics["loss_recovered"]
    title = "cross-entropy with the hook point replaced"
    axes.set(ylabel="nats per token", title=title if recovered is None else f"{title}\nloss recovered {recovered:.4f}")
    return figure


def density_figure(density: np.ndarray, tokens: int) -> Figure:
    """Histogram of log10 feature density `[d_sae]`; features that never fired are counted in the title."""
    alive = density[density > 0]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(np.log10(alive), bins=60, color=_LINE)
    dead = len(density) - len(alive)
    axes.set(
        xlabel="log10 of the share of tokens on which a feature fires",
        ylabel="features",
        title=f"{len(density):,} features on {tokens:,} held-out tokens, {dead:,} never fired",
    )
    return figure
