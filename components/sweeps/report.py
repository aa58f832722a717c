"""What a sweep's own MLflow run and its table say beyond the points: laws and pictures, as far as the points carry them."""

from __future__ import annotations

from typing import Any

from components.run.config import RunConfig
from components.settings import UserError
from components.sweeps.record import SweepRecord
from components.sweeps.scaling import Fit, Scaling, fit_sweep


def laws_or_reason(record: SweepRecord, config: RunConfig) -> tuple[Scaling | None, str | None]:
    """The laws, or why there are none."""
    fit, reason = _fit(record, config)
    return (None if fit is None else fit.summary()), reason


def _fit(record: SweepRecord, config: RunConfig) -> tuple[Fit | None, str | None]:
    try:
        return fit_sweep(record, config), None
    except UserError as error:
        return None, str(error).removeprefix("--sweep: ")


def log_report(record: SweepRecord, config: RunConfig, open_run: Any) -> None:
    """Record, laws and pictures into the sweep's MLflow run; open_run: of `tracked_run`."""
    from components.sweeps import charts

    open_run.log_text(record.model_dump_json(indent=2), "sweep.json")
    figures = {}
    if record.finished:
        figures["pareto"] = charts.pareto(record.finished)
    fit, _ = _fit(record, config)
    if fit is not None:
        open_run.log_text(fit.summary().model_dump_json(indent=2), "laws.json")
        figures |= {"isoflop": charts.isoflop(fit), "frontier": charts.frontier(fit)}
    open_run.log_figures(figures)
