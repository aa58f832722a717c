"""Every picture that is drawn of an SAE, for the report (SVG that takes its colours from the page) and for MLflow (PNG)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {
    "accent": "#2f6fde", "good": "#12925a", "muted": "#b9c0cb", "ink": "#16191f", "soft": "#5a6372", "grid": "#e3e6eb",
    "card": "#fefefe",
}  # fmt: skip
"""Those of the report's light page, by the names that its style sheet has for them."""
_STYLE = {
    "axes.edgecolor": _COLOURS["grid"], "axes.labelcolor": _COLOURS["soft"], "axes.titlecolor": _COLOURS["soft"],
    "axes.axisbelow": True, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "grid.color": _COLOURS["grid"], "xtick.color": _COLOURS["grid"], "ytick.color": _COLOURS["grid"],
    "xtick.labelcolor": _COLOURS["soft"], "ytick.labelcolor": _COLOURS["soft"], "text.color": _COLOURS["ink"],
    "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "sae",
}  # fmt: skip
_LOSSES = (
    ("clean", "as it is", "good"),
    ("sae", "with the SAE", "accent"),
    ("mean", "mean", "muted"),
    ("zero", "zero", "muted"),
)


@dataclass(frozen=True)
class Dot:
    label: str
    x: float
    y: float
    kind: str
    """Name of its colour."""


def styled() -> AbstractContextManager[None]:
    """What is drawn meanwhile looks like the report's other pictures."""
    return mpl.rc_context(_STYLE)


def svg(figure: Figure) -> Markup:
    """For a page's own style sheet: it gives the colours and the font, and nothing in it points elsewhere."""
    with styled(), io.StringIO() as stream:
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<svg) (?:height|width)="[^"]*"| (?:height|width)="[\d.]+pt"', "", text)
    text = re.sub(r" ?font-family:[^;\"]*;?", "", text.replace("xlink:href", "href"))
    text = re.sub(r' clip-path="url\(#\w+\)"', "", text)  # nothing is drawn outside, and a page shares its names
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text.replace("<svg", '<svg role="img"', 1))  # matplotlib escapes what it is given


def _axes(
    size: tuple[float, float], columns: int = 1, rows: int = 1, left: float = 0.65, top: float = 0.15, bottom: float = 0.5
) -> tuple[Figure, list[Axes]]:
    """size and margins: inches. They are given, and not measured of what is drawn: that would take as long as drawing it."""
    width, height = size
    gaps = {"left": left / width, "right": 1 - 0.2 / width, "top": 1 - top / height, "bottom": bottom / height}
    with styled():
        figure = Figure(figsize=size)
        panels = figure.subplots(rows, columns)
        figure.subplots_adjust(**gaps, wspace=0.2, hspace=0.5)
        return figure, list(np.ravel(panels))


def training(curves: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, explained variance, L0 and dead fraction against tokens."""
    titles = {"loss": "loss", "explained_variance": "explained variance", "l0": "L0", "dead_fraction": "dead fraction"}
    figure, panels = _axes((9, 5.4), 2, 2, top=0.3)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        values = [point[key] for point in curves]
        axes.plot([point["tokens"] for point in curves], values, color=_COLOURS["accent"], linewidth=1.3)
        axes.set(title=title, xlabel="tokens", yscale="log" if key == "l0" and min(values, default=0) > 0 else "linear")
        if key == "dead_fraction":
            axes.set_ylim(0, max(0.01, 1.05 * max(values, default=0)))
    return figure


def losses(metrics: Mapping[str, Any]) -> Figure:
    """The four cross-entropies as bars from zero, each with its interval as a whisker; those that are null are left out."""
    shown = [(label, colour, f"ce_loss_{name}") for name, label, colour in _LOSSES if metrics[f"ce_loss_{name}"] is not None]
    figure, (axes,) = _axes((5, 2.3), left=1.05)
    for place, (_, colour, name) in enumerate(shown):
        value, low, high = metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        axes.barh(place, value, height=0.55, color=_COLOURS[colour])
        if low is not None and high is not None:
            # The percentile interval of a skewed metric may lie beside its value.
            axes.errorbar((low + high) / 2, place, xerr=(high - low) / 2, color=_COLOURS["ink"], capsize=3, linewidth=1.2)
        axes.annotate(f"{value:.4g}", (max(value, high or value), place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(shown)), [label for label, *_ in shown])
    axes.set(xlabel="nats per token")
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(axis="y", visible=False)
    return figure


def density(values: np.ndarray) -> Figure:
    """Histogram of log10 feature density `[d_sae]`, of the features that fired at all."""
    alive = np.log10(values[values > 0])
    figure, (axes,) = _axes((5, 2.5), left=0.75)
    if len(alive):
        low, high = np.floor(alive.min() * 2) / 2, np.ceil(alive.max() * 2) / 2
        axes.hist(alive, bins=np.arange(low, max(high, low + 1) + 1e-9, 0.125).tolist(), color=_COLOURS["accent"], rwidth=0.9)
        ticks = np.arange(np.ceil(low), max(high, low + 1) + 1e-9)
        axes.set_xticks(ticks, [f"{100 * 10.0**tick:.4g}%" for tick in ticks])
    axes.set(xlabel="share of tokens on which a feature fires", ylabel="features")
    axes.grid(axis="x", visible=False)
    return figure


def feature_map(x: np.ndarray, y: np.ndarray, densities: np.ndarray) -> Figure:
    """A dot per feature that fires: places `[d_sae]` (NaN for those that do not), larger and darker where it is denser."""
    figure, (axes,) = _axes((4.5, 4.5), left=0.2, top=0.2, bottom=0.35)
    shown = np.isfinite(x) & np.isfinite(y) & (densities > 0)
    strength = np.log10(densities[shown])
    span = max(float(np.ptp(strength)), 1e-9) if shown.any() else 1.0
    strength = (strength - strength.min(initial=0.0)) / span
    axes.scatter(x[shown], y[shown], s=3 + 22 * strength, color=_COLOURS["accent"], alpha=0.2 + 0.6 * strength, linewidths=0)
    axes.set(xticks=[], yticks=[], aspect="equal", xlabel=f"{int(shown.sum()):,} features that fire, by direction")
    return figure


def breakdown(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """One line per group: cross-entropy as it is and with the SAE (where it was measured), explained variance, L0."""
    losses = "ce_loss_clean" in rows[0]
    figure, panels = _axes((10, 0.75 + 0.3 * len(rows)), 2 + losses, left=2.6, top=0.3, bottom=0.3)
    places = range(len(rows))
    for place, row in enumerate(rows if losses else ()):
        if row["ce_loss_clean"] is not None and row["ce_loss_sae"] is not None:
            ends = (row["ce_loss_clean"], row["ce_loss_sae"])
            panels[0].plot(ends, (place, place), color=_COLOURS["muted"], linewidth=2, zorder=1)
            panels[0].scatter(ends, (place, place), c=[_COLOURS["good"], _COLOURS["accent"]], s=30, zorder=2)
    for axes, name in zip(panels[-2:], ("explained_variance", "l0"), strict=True):
        for place, row in enumerate(rows):
            if row[name] is not None:
                axes.barh(place, row[name], height=0.45, color=_COLOURS["accent"])
                shown = f"{row[name]:.3f}" if abs(row[name]) < 2 else f"{row[name]:.4g}"
                axes.annotate(shown, (max(row[name], 0), place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.margins(x=0.16)
    titles = (*(["cross-entropy, nats"] if losses else []), "explained variance", "L0")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(places, [""] * len(rows))
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(places, [f"{name}  ({row['tokens']:,} tokens)" for name, row in zip(names, rows, strict=True)])
    return figure


def scatter(dots: Sequence[Dot], y_label: str) -> Figure:
    """Points by L0 and quality, and the line of those that no other beats in both (fewer features, higher quality)."""
    figure, (axes,) = _axes((5, 3), left=0.85)
    by_l0 = sorted(dots, key=lambda dot: (dot.x, -dot.y))
    best = np.maximum.accumulate([dot.y for dot in by_l0])
    frontier = [(dot.x, dot.y) for dot, most in zip(by_l0, best, strict=True) if dot.y == most]
    axes.plot(*zip(*frontier, strict=True), color=_COLOURS["muted"], linestyle="--", linewidth=1.3, zorder=1)
    for dot in dots:
        own = dot.kind == "accent"
        axes.scatter(dot.x, dot.y, s=70 if own else 36, color=_COLOURS[dot.kind], edgecolors=_COLOURS["card"], zorder=2 + own)
        axes.annotate(dot.label, (dot.x, dot.y), (6, 6), textcoords="offset points", fontsize=9 if own else 8)
    axes.set(xlabel="L0", ylabel=y_label)
    axes.margins(x=0.25, y=0.16)
    return figure
