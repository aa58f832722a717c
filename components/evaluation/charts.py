"""Charts as inline SVG: they need no script and no network, scale with the page and take their colours from its style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    kind: str
    """Style class: `accent`, `good` or `muted`."""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Dot:
    label: str
    x: float
    y: float
    kind: str


def bars(items: Sequence[Bar], unit: str, width: int = 480) -> Markup:
    """Horizontal bars from zero, each with its value, and its interval as a whisker."""
    left, row, top = 100, 40, 14
    # room on the right for the longest value
    largest = max((max(bar.value, bar.high or 0.0) for bar in items), default=1.0) or 1.0
    plot = width - left - 105
    parts = []
    for number, bar in enumerate(items):
        y = top + number * row
        length = max(1.0, bar.value / largest * plot)
        interval = "" if bar.low is None else f" ({bar.low:.4g} to {bar.high:.4g})"
        parts.append(f"<g><title>{escape(bar.label)}: {bar.value:.4f} {unit}{interval}</title>")
        parts.append(_text(left - 10, y + 17, bar.label, "label end"))
        parts.append(f'<path class="{bar.kind}" d="{_rounded(left, y + 3, length, 20)}"/>')
        end = left + length
        if bar.low is not None and bar.high is not None:
            low, high = left + bar.low / largest * plot, left + bar.high / largest * plot
            parts.append(f'<path class="whisker" d="M{low:.1f} {y + 13}H{high:.1f}M{low:.1f} {y + 9}v8M{high:.1f} {y + 9}v8"/>')
            end = max(end, high)
        parts.append(_text(end + 8, y + 17, f"{bar.value:.3f} {unit}", "value"))
        parts.append("</g>")
    return _svg(width, top + len(items) * row, parts)


def histogram(values: np.ndarray, label: str, unit: str, width: int = 480, height: int = 230) -> Markup:
    """Counts of `values` in bins of a quarter."""
    left, bottom, top, right = 44, 42, 10, 22
    low, high = math.floor(values.min() * 2) / 2, max(math.ceil(values.max() * 2) / 2, math.floor(values.min() * 2) / 2 + 1)
    bins = round((high - low) * 8)
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    plot_w, plot_h = width - left - right, height - top - bottom
    ticks = _ticks(0, float(counts.max()))
    scale = plot_h / ticks[-1]
    parts = _horizontal_grid(ticks, left, width - right, lambda value: top + plot_h - value * scale)
    step = plot_w / bins
    for number, count in enumerate(counts.tolist()):
        if count:
            x, h = left + number * step, count * scale
            title = f"<title>{count:,} {unit} between 10^{edges[number]:.2f} and 10^{edges[number + 1]:.2f}</title>"
            place = f'x="{x + 1:.1f}" y="{top + plot_h - h:.1f}" width="{step - 2:.1f}" height="{h:.1f}"'
            parts.append(f'<g>{title}<rect class="accent" {place} rx="1.5"/></g>')
    for value in np.arange(math.ceil(low), high + 1e-9, 1 if high - low > 2 else 0.5):
        x = left + (value - low) / (high - low) * plot_w
        share = 100 * 10.0**value
        parts.append(_text(x, top + plot_h + 17, f"{share:.4g}%", "tick middle"))
    parts.append(_text(left + plot_w / 2, height - 4, label, "axis middle"))
    return _svg(width, height, parts)


def breakdown(rows: Sequence[Mapping[str, Any]], names: Sequence[str], width: int = 980) -> Markup:
    """One line per group: cross-entropy as it is and with the SAE, explained variance, L0."""
    left, row, top = 150, 30, 44
    gap, right = 58, 50
    panel = (width - left - 90 - right - 2 * gap) / 3
    height = top + len(rows) * row + 8
    parts: list[str] = []
    losses = [value for item in rows for value in (item["ce_loss_clean"], item["ce_loss_sae"]) if value is not None]
    panels = (
        ("cross-entropy, nats", max(losses, default=1.0)),
        ("explained variance", 1.0),
        ("L0", max((item["l0"] for item in rows), default=1.0)),
    )
    parts.append(_text(left + 62, top - 22, "tokens", "axis end"))
    for number, (title, largest) in enumerate(panels):
        x0 = left + 90 + number * (panel + gap)
        parts.append(_text(x0, top - 22, title, "axis"))
        for value in _ticks(0, largest):
            x = x0 + value / _ticks(0, largest)[-1] * panel
            parts.append(f'<path class="grid" d="M{x:.1f} {top}V{height - 8}"/>')
            parts.append(_text(x, top - 6, f"{value:g}", "tick middle"))
    for number, (item, name) in enumerate(zip(rows, names, strict=True)):
        y = top + number * row + row / 2
        parts.append(_text(left - 12, y + 4, name, "label end"))
        parts.append(_text(left + 62, y + 4, f"{item['tokens']:,}", "tick end"))
        for place, (_, largest) in enumerate(panels):
            x0 = left + 90 + place * (panel + gap)
            scale = panel / _ticks(0, largest)[-1]
            if place == 0:
                parts += _gap(x0, y, scale, item, name)
            else:
                value = item["explained_variance"] if place == 1 else item["l0"]
                parts += _length(x0, y, scale, value, f"{name}: {panels[place][0]}")
    return _svg(width, height, parts)


def scatter(dots: Sequence[Dot], x_label: str, y_label: str, width: int = 480, height: int = 300) -> Markup:
    """Points by L0 and quality, and the line of those that no other beats in both (fewer features, higher quality)."""
    left, bottom, top, right = 58, 42, 14, 24
    plot_w, plot_h = width - left - right, height - top - bottom
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    x_low, x_high = _padded(min(xs), max(xs), 0.08 * max(xs))
    y_low, y_high = _padded(min(ys), max(ys), 0.01)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x_low) / (x_high - x_low) * plot_w, top + (y_high - y) / (y_high - y_low) * plot_h

    y_ticks = [tick for tick in _ticks(y_low, y_high, 5) if y_low <= tick <= y_high]
    parts = _horizontal_grid(y_ticks, left, width - right, lambda value: at(x_low, value)[1])
    for tick in _ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            parts.append(_text(at(tick, y_low)[0], top + plot_h + 17, f"{tick:g}", "tick middle"))
    frontier = [at(dot.x, dot.y) for dot in _frontier(dots)]
    parts.append('<path class="frontier" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in frontier) + '"/>')
    for dot in sorted(dots, key=lambda dot: dot.kind == "accent"):
        x, y = at(dot.x, dot.y)
        radius = 7 if dot.kind == "accent" else 5
        parts.append(f"<g><title>{escape(dot.label)}: {x_label} {dot.x:.2f}, {y_label} {dot.y:.4f}</title>")
        parts.append(f'<circle class="dot {dot.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')
        side = ("end", -radius - 5) if x > left + 0.7 * plot_w else ("", radius + 5)
        parts.append(_text(x + side[1], y + 4, dot.label, f"{'value' if dot.kind == 'accent' else 'tick'} {side[0]}"))
        parts.append("</g>")
    parts.append(_text(left + plot_w / 2, height - 5, x_label, "axis middle"))
    return _svg(width, height, parts)


def _frontier(dots: Sequence[Dot]) -> list[Dot]:
    kept: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, -dot.y)):
        if not kept or dot.y > kept[-1].y:
            kept.append(dot)
    return kept


def _gap(x0: float, y: float, scale: float, item: Mapping[str, Any], name: str) -> list[str]:
    clean, sae = item["ce_loss_clean"], item["ce_loss_sae"]
    if clean is None or sae is None:
        return []
    a, b = x0 + clean * scale, x0 + sae * scale
    title = f"<title>{escape(name)}: {clean:.4f} as it is, {sae:.4f} with the SAE</title>"
    return [
        f'<g>{title}<path class="joint" d="M{a:.1f} {y:.1f}H{b:.1f}"/>',
        f'<circle class="dot good" cx="{a:.1f}" cy="{y:.1f}" r="5"/>',
        f'<circle class="dot accent" cx="{b:.1f}" cy="{y:.1f}" r="5"/></g>',
    ]


def _length(x0: float, y: float, scale: float, value: float | None, title: str) -> list[str]:
    if value is None:
        return []
    end = max(1.0, value * scale)
    return [
        f"<g><title>{escape(title)} {value:.4f}</title>",
        f'<path class="accent" d="{_rounded(x0, y - 6, end, 12)}"/>',
        _text(x0 + end + 6, y + 4, f"{value:.3f}" if value < 2 else f"{value:.1f}", "tick"),
        "</g>",
    ]


def _rounded(x: float, y: float, width: float, height: float) -> str:
    """A bar with its far end rounded; it is square where it stands on the axis."""
    r = min(4.0, width)
    return (
        f"M{x:.1f} {y:.1f}h{width - r:.1f}q{r:.1f} 0 {r:.1f} {r:.1f}v{height - 2 * r:.1f}q0 {r:.1f} {-r:.1f} {r:.1f}H{x:.1f}z"
    )


def _horizontal_grid(ticks: Sequence[float], left: float, right: float, place: Any) -> list[str]:
    parts = []
    for tick in ticks:
        y = place(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:,g}", "tick end"))
    return parts


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    rough = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _padded(low: float, high: float, least: float) -> tuple[float, float]:
    # Never nothing, beside the values or beside zero: an SAE without a live feature has an L0 of 0.
    margin = max(0.12 * (high - low), least, 1e-3 * max(abs(low), abs(high)), 1e-3)
    return low - margin, high + margin


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(width: int, height: float, parts: Sequence[str]) -> Markup:
    return Markup(f'<svg viewBox="0 0 {width} {height:.0f}" role="img">' + "".join(map(str, parts)) + "</svg>")
