"""The evaluation as one HTML file that needs nothing else: no network, no script, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from components.evaluation import charts
from components.evaluation.charts import Dot
from components.evaluation.probing_table import lines, sizes
from components.evaluation.record import EvaluationRecord

_TILES = (
    ("explained_variance", "explained variance", "{:.4f}"),
    ("loss_recovered", "loss recovered", "{:.4f}"),
    ("l0", "L0", "{:.2f}"),
    ("kl_divergence", "KL divergence, nats", "{:.4f}"),
    ("mse", "MSE per dimension", "{:.4g}"),
    ("dead_fraction", "dead features", "{:.2%}"),
)
_COLUMNS = (
    ("l0", "L0", 2), ("explained_variance", "explained variance", 4), ("loss_recovered", "loss recovered", 4),
    ("ce_loss", "cross-entropy", 4), ("kl_divergence", "KL divergence", 4), ("mse", "MSE", 4),
    ("cosine_similarity", "cosine", 4),
)  # fmt: skip
"""Of the table of baselines: metric, title, decimal places."""
_NAMES = {
    "sae": "this SAE", "identity": "identity", "zero": "zero", "mean": "mean", "pca": "PCA",
    "random_directions": "random directions", "neurons": "the model's own basis",
}  # fmt: skip


def render(record: EvaluationRecord, density: np.ndarray, earlier: Sequence[Mapping[str, Any]]) -> str:
    """The page for an evaluation record.

    density `[d_sae]`: share of tokens on which each feature fires. earlier: SAEs to compare with, measured on the same
    tokens, each with `name`, `l0`, `explained_variance` and `loss_recovered`.
    """
    source = resources.files("components.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    metrics, breakdown = record.metrics, record.breakdown
    probes = lines(record.optional.get("probing", {}))
    return environment.from_string(source).render(
        about=record.about,
        metrics=metrics,
        device=record.device,
        warnings=record.warnings,
        digest=record.digest,
        tiles=[_tile(metrics, *tile) for tile in _TILES if tile[0] in metrics],
        losses=charts.svg(charts.losses(metrics)) if "ce_loss_sae" in metrics else "",
        of_next_token="ce_loss_sae" in metrics,
        columns=[column for column in _COLUMNS if not record.baselines or column[0] in record.baselines[0]],
        density=charts.svg(charts.density(density)) if density.any() else "",
        dead=int((density == 0).sum()),
        features=len(density),
        positions=_groups(breakdown["position"], _range),
        classes=_groups(breakdown["token_class"], lambda row: str(row["token_class"])),
        baselines=[{**row, "label": _NAMES[str(row["name"])]} for row in record.baselines],
        probes=probes,
        probe_sizes=sizes(probes),
        probed=breakdown.get("probing", []),
        differences=breakdown.get("difference", []),
        pareto=_pareto(metrics, earlier),
        earlier=len(earlier),
    )


def _tile(metrics: Mapping[str, Any], name: str, label: str, style: str) -> dict[str, str]:
    def shown(value: float | None) -> str:
        return "-" if value is None else style.format(value)

    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return {
        "label": label,
        "value": shown(metrics[name]),
        "interval": "" if low is None else f"{shown(low)} to {shown(high)}",
    }


def _groups(rows: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]) -> str:
    return charts.svg(charts.breakdown(rows, [name(row) for row in rows])) if rows else ""


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}-{row['last']}"


def _pareto(metrics: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    panels = []
    for name, label in (("explained_variance", "explained variance"), ("loss_recovered", "loss recovered")):
        dots = [Dot(str(one["name"]), one["l0"], one[name], "muted") for one in earlier if one.get(name) is not None]
        if metrics.get(name) is not None:
            dots.append(Dot("this SAE", metrics["l0"], metrics[name], "accent"))
        if dots:
            panels.append({"title": label, "chart": charts.svg(charts.scatter(dots, label))})
    return panels
