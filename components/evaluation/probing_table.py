"""What probes found, as a table for people: a line for each task and kind of probe, a cell for each k."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = {
    "sae": "this SAE",
    "random_directions": "untrained dictionary",
    "random_features": "its features by chance",
    "coordinates": "coordinates",
    "dense": "every coordinate",
}
"""In the order of the table."""


@dataclass
class Line:
    task: str
    kind: str
    """Of `KINDS`."""
    values: dict[int | None, tuple[float, float | None, float | None]] = field(default_factory=dict)
    """Balanced accuracy with the bounds of its interval, by k; None for probes that read everything."""

    @property
    def label(self) -> str:
        return KINDS[self.kind]

    def cell(self, k: int, interval: bool = True) -> str:
        """As text; a probe that reads everything stands under every k."""
        found = self.values.get(k, self.values.get(None))
        if found is None:
            return "-"
        value, low, high = found
        return f"{value:.3f} ({low:.3f} to {high:.3f})" if interval and low is not None and high is not None else f"{value:.3f}"


def lines(metrics: Mapping[str, float | int | None]) -> list[Line]:
    """metrics: as `probing.probe` names them."""
    found: dict[tuple[str, str], Line] = {}
    for name, value in metrics.items():
        match = re.fullmatch(rf"(.+)/({'|'.join(KINDS)})(?:_(\d+))?", name)
        if match is None or value is None:
            continue
        task, kind, k = match.groups()
        line = found.setdefault((task, kind), Line(task, kind))
        line.values[int(k) if k else None] = (value, metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))
    order = list(KINDS)
    return sorted(found.values(), key=lambda line: (line.task, order.index(line.kind)))


def sizes(table: list[Line]) -> list[int]:
    """Every k of the table."""
    return sorted({k for line in table for k in line.values if k is not None})
