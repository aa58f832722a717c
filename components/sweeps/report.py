"""Record, laws and pictures of a sweep, where people look for them: its MLflow run, and a page beside its record."""

from __future__ import annotations

from typing import Any

from components import storage
from components.run.config import RunConfig
from components.sweeps.findings import found_with_fit
from components.sweeps.record import SweepRecord


def log_report(record: SweepRecord, url: str, config: RunConfig, open_run: Any) -> None:
    """Everything into the sweep's MLflow run, and its page beside the record at `url` as well.

    open_run: of `tracked_run`."""
    from components.sweeps import charts, page

    found, fit = found_with_fit(record, config)
    figures = charts.pictures(record.finished, fit)
    shown = page.render(record, found, figures)
    storage.put_bytes(shown.encode("utf-8"), storage.join(url, page.NAME))
    open_run.log_text(shown, page.NAME)
    open_run.log_text(record.model_dump_json(indent=2), "sweep.json")
    open_run.log_text(found.model_dump_json(indent=2), "laws.json")
    open_run.log_figures(figures)
