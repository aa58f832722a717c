"""The pictures of a sweep: loss at equal compute, the frontier, and quality against sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from components.evaluation.charts import styled
from components.sweeps.record import SweepPoint
from components.sweeps.scaling import Fit, frontier_points

_BUDGETS = 5
_MARKERS = "osD^vP*X"


def pictures(finished: Sequence[SweepPoint], fit: Fit | None) -> dict[str, Figure]:
    """Those that there is something to show in, by name."""
    found = {"pareto": pareto(finished)} if finished else {}
    return found if fit is None else {**found, "isoflop": isoflop(fit), "frontier": frontier(fit)}


def isoflop(fit: Fit) -> Figure:
    """Loss against features: every setting's best training, coloured by compute, and the law at equal compute."""
    figure, axes = _axes("features", "normalised MSE")
    flops = np.array([point.flops_dense for point in fit.points], float)
    norm = LogNorm(flops.min(), max(flops.max(), flops.min() * 1.01))
    sizes, losses = [point.features for point in fit.points], [point.loss for point in fit.points]
    dots = axes.scatter(sizes, losses, c=flops, norm=norm, cmap="viridis", zorder=3)
    features = np.geomspace(min(sizes) / 1.5, max(sizes) * 1.5, 200)
    for budget in np.geomspace(flops.min(), flops.max(), _BUDGETS) if fit.has_optimum else ():
        tokens = budget / fit.flops_per_feature / features
        axes.plot(features, np.exp(fit.log_loss(features, tokens)), color=colormaps["viridis"](norm(budget)), linewidth=1)
        n, d = fit.optimum(float(budget))
        axes.plot(n, np.exp(fit.log_loss(n, d)), marker="x", color="#16191f", markersize=6, zorder=4)
    axes.set(xscale="log", yscale="log")
    figure.colorbar(dots, ax=axes, label="dense FLOPs")
    return figure


def frontier(fit: Fit) -> Figure:
    """Loss against compute: all trainings, those that none with less compute beats, and the law's optimum."""
    figure, axes = _axes("dense FLOPs", "normalised MSE")
    everything, best = fit.everything, frontier_points(fit.points)
    spent, reached = [point.flops_dense for point in everything], [point.loss for point in everything]
    axes.scatter(spent, reached, color="#b9c0cb", s=18, label="trained")
    axes.plot(
        [point.flops_dense for point in best], [point.loss for point in best], "o-", color="#2f6fde", markersize=5,
        linewidth=1, label="none cheaper is better",
    )  # fmt: skip
    if fit.has_optimum:
        flops = np.array([point.flops_dense for point in everything], float)
        budgets = np.geomspace(flops.min(), 3 * flops.max(), 100)
        found = [fit.optimum(float(budget)) for budget in budgets]
        losses = [float(np.exp(fit.log_loss(n, d))[0]) for n, d in found]
        inside = budgets <= flops.max()
        axes.plot(budgets[inside], np.array(losses)[inside], color="#12925a", label="law, best features and tokens")
        axes.plot(budgets[~inside], np.array(losses)[~inside], "--", color="#12925a", label="the same, extrapolated")
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    return figure


def pareto(points: Sequence[SweepPoint]) -> Figure:
    """Loss recovered and explained variance against L0, by architecture."""
    with styled():
        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ("loss_recovered", "explained_variance"), strict=True):
        for marker, architecture in zip(_MARKERS, sorted({point.architecture for point in points}), strict=False):
            shown = [point for point in points if point.architecture == architecture and _both(point, name)]
            axes.scatter(
                [point.l0 for point in shown], [getattr(point, name) for point in shown], marker=marker, s=22, alpha=0.8,
                label=architecture,
            )  # fmt: skip
        best = _unbeaten([point for point in points if _both(point, name)], name)
        axes.plot([point.l0 for point in best], [getattr(point, name) for point in best], "--", color="#b9c0cb", zorder=1)
        _plain(axes, "L0", name.replace("_", " "))
        axes.legend(frameon=False, fontsize=8)
    return figure


def _both(point: SweepPoint, name: str) -> bool:
    return point.l0 is not None and getattr(point, name) is not None


def _unbeaten(points: Sequence[SweepPoint], name: str) -> list[SweepPoint]:
    """Those that none with as few active features beats."""
    found: list[SweepPoint] = []
    for point in sorted(points, key=lambda one: (one.l0, -getattr(one, name))):
        if not found or getattr(point, name) > getattr(found[-1], name):
            found.append(point)
    return found


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    with styled():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
    _plain(axes, x, y)
    return figure, axes


def _plain(axes: Any, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color="#e3e6eb", which="both", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
