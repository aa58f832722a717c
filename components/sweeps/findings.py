"""What is said of a sweep beyond its points: laws and the L0 to choose, as far as the points carry them."""

from __future__ import annotations

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
    return found_with_fit(record, config)[0]


def found_with_fit(record: SweepRecord, config: RunConfig) -> tuple[Findings, Fit | None]:
    fit, laws, reason, sparsity = None, None, None, None
    try:
        sparsity = advise(usable_points(record, config))
        fit = fit_sweep(record, config)
        laws = fit.summary()
    except UserError as error:
        reason = str(error).removeprefix("--sweep: ")
    return Findings(laws=laws, no_laws=reason, sparsity=sparsity), fit
