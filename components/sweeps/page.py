"""A sweep as one HTML file that needs nothing else: its pictures, laws and children; no network, no script, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from components.evaluation.charts import svg
from components.sweeps.findings import Findings
from components.sweeps.record import SweepRecord
from components.sweeps.scaling import Estimate, Scaling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "sweep.html"
_PICTURES = ("isoflop", "frontier", "pareto")


def render(record: SweepRecord, found: Findings, figures: Mapping[str, Figure]) -> str:
    """figures: those of `charts.pictures`, which may be fewer than all."""
    source = resources.files("components.sweeps").joinpath("sweep.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        record=record,
        found=found,
        hook_points=", ".join(sorted({point.hook_point for point in record.points})),
        architectures=", ".join(sorted({point.architecture for point in record.points})),
        laws=[] if found.laws is None else laws_table(found.laws),
        **{name: svg(figures[name]) if name in figures else "" for name in _PICTURES},
    )


def laws_table(laws: Scaling) -> list[tuple[str, str, str]]:
    """Name, value and 90% interval of each law, for people."""
    rows: list[tuple[str, str, str]] = []

    def row(name: str, estimate: Estimate) -> None:
        rows.append((name, f"{estimate.value:.4g}", f"{estimate.low:.4g} to {estimate.high:.4g}"))

    for title, frontier in (("best loss", laws.frontier), ("best loss observed", laws.observed_frontier)):
        if frontier is not None:
            row(f"{title} = floor + {frontier.coefficient:.3g} C^-c: floor", frontier.floor)
            row("   c", frontier.exponent)
    for title, power in (("features", laws.features), ("steps", laws.steps)):
        if power is not None:
            row(f"best {title} = {power.coefficient:.3g} C^a: a", power.exponent)
    for name, estimate in laws.law.items():
        row(f"joint law, {name}", estimate)
    if laws.trial is not None:
        cheap, dear = laws.trial.fitted, laws.trial.foretold
        title = f"measured over foretold: of the law of the {cheap} cheapest settings, for the other {dear}"
        rows.append((title, f"{math.exp(laws.trial.mean):.3f}", f"misses by {laws.trial.spread:.1%}"))
    rate = laws.learning_rate
    if rate.coefficient is None or rate.exponent is None or rate.low is None or rate.high is None:
        rows.append(("best learning rate", ", ".join(f"{n}: {tried:g}" for n, tried in rate.tried.items()), rate.said))
    else:
        title = f"best learning rate = {rate.coefficient:.3g} n^q D^{rate.tokens_exponent:.3g}: q"
        row(title, Estimate(value=rate.exponent, low=rate.low, high=rate.high))
    return rows
