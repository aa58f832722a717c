"""What is said of a sweep beyond its points: laws, the L0 to choose and pictures, as far as the points carry them."""

from __future__ import annotations

from typing import Any

from components.run.config import RunConfig
from components.settings import Record, UserError
from components.sweeps.record import SweepRecord
from components.sweeps.scaling import Fit, Scaling, fit_sweep, usable_points
from components.sweeps.sparsity import SparsityAdvice, advise


class Findings(Record):
    laws: Scaling | None
    no_laws: str | None
    """Why there are none."""
    sparsity: SparsityAdvice | None
    """None where fewer than three values of k were tried."""


def findings(record: SweepRecord, config: RunConfig) -> Findings:
    """config: of the sweep; it says which of the points count where the sweep varies more than the laws know of."""
    return _found(record, config)[0]


def _found(record: SweepRecord, config: RunConfig) -> tuple[Findings, Fit | None]:
    fit, laws, reason, sparsity = None, None, None, None
    try:
        sparsity = advise(usable_points(record, config))
        fit = fit_sweep(record, config)
        laws = fit.summary()
    except UserError as error:
        reason = str(error).removeprefix("--sweep: ")
    return Findings(laws=laws, no_laws=reason, sparsity=sparsity), fit


def log_report(record: SweepRecord, config: RunConfig, open_run: Any) -> None:
    """Record, findings and pictures into the sweep's MLflow run; open_run: of `tracked_run`."""
    from components.sweeps import charts

    found, fit = _found(record, config)
    open_run.log_text(record.model_dump_json(indent=2), "sweep.json")
    open_run.log_text(found.model_dump_json(indent=2), "laws.json")
    figures = {}
    if record.finished:
        figures["pareto"] = charts.pareto(record.finished)
    if fit is not None:
        figures |= {"isoflop": charts.isoflop(fit), "frontier": charts.frontier(fit)}
    open_run.log_figures(figures)
