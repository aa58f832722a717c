"""From the sums of a whole text to what is reported of an SAE; the language model is not needed any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa
from torch import Tensor

from components.evaluation import intervals as bootstrap
from components.evaluation.features import feature_table
from components.evaluation.held_out import Predicts
from components.evaluation.metrics import Sums, Totals, number
from components.evaluation.record import Metrics, Row
from components.evaluation.settings import EvaluationSettings
from components.evaluation.span_totals import Measured
from components.evaluation.token_classes import CLASSES
from components.settings import UserError

Value = TypeVar("Value")

WITH_INTERVAL = (
    "explained_variance", "loss_recovered", "loss_recovered_mean", "l0", "mse", "kl_divergence",
    "ce_loss_clean", "ce_loss_sae", "ce_loss_zero", "ce_loss_mean",
)  # fmt: skip
"""Metrics that come with `_low` and `_high`, the bounds of their 95% confidence interval over documents."""
_OF_NEXT_TOKEN = (
    "ce_loss", "ce_loss_clean", "ce_loss_sae", "ce_loss_zero", "ce_loss_mean", "loss_recovered", "loss_recovered_mean"
)  # fmt: skip
_LEFT_OUT: dict[Predicts, tuple[str, ...]] = {
    "next_token": (), "answer": _OF_NEXT_TOKEN, "classes": _OF_NEXT_TOKEN, "nothing": (*_OF_NEXT_TOKEN, "kl_divergence")
}  # fmt: skip
"""Metrics that do not apply are absent, and not null."""


def applicable(row: Mapping[str, Value], predicts: Predicts) -> dict[str, Value]:
    """Those metrics that there are where the model predicts that."""
    return {name: value for name, value in row.items() if name not in _LEFT_OUT[predicts]}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found, named as in `EvaluationRecord`."""

    metrics: Metrics
    breakdown: dict[str, list[Row]]
    baselines: list[Row]
    features: pa.Table
    """A row per feature."""
    optional: dict[str, Metrics] = field(default_factory=dict)


def active_features(settings: EvaluationSettings, measured: Measured, predicts: Predicts = "next_token") -> float:
    """The SAE's L0, which the baselines are given too; a UserError where there is nothing to be found out."""
    totals = measured.totals()
    if totals.tokens == 0 or (totals.positions == 0 and predicts != "nothing"):
        raise UserError(
            f"evaluation: no held-out token is left to measure on; raise evaluation.tokens ({settings.tokens}), or leave "
            "out fewer in activations.exclude"
        )
    return float(totals.of("sae")["l0"])


def finish(
    settings: EvaluationSettings,
    measured: Measured,
    compared: Measured | None,
    decoder: Tensor | None,
    predicts: Predicts = "next_token",
) -> Evaluation:
    """Everything that is said of one SAE.

    measured: by `measure_sae`. compared: by `measure_baselines`, None without baselines. decoder: rows `[d_sae, d_in]`.
    """
    totals, features = measured.totals(), measured.features
    assert features is not None
    metrics: Metrics = {name: number(value) for name, value in applicable(totals.summary(), predicts).items()}
    metrics |= _bounds(measured, metrics)
    metrics["dead_fraction"] = features.dead_fraction
    metrics["evaluation_tokens"] = int(totals.tokens)
    metrics["evaluation_documents"] = len(measured.documents)
    return Evaluation(
        metrics=metrics,
        breakdown=_breakdown(measured, predicts),
        baselines=[] if compared is None else _baseline_rows(settings, compared, predicts),
        features=feature_table(features, decoder, settings.neighbours),
    )


def _bounds(measured: Measured, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """`<metric>_low` and `<metric>_high` of every metric with an interval."""

    def summary(table: np.ndarray, shifted: np.ndarray) -> dict[str, np.ndarray]:
        values = Totals(table, shifted, measured.variants).summary()
        return {name: values[name] for name in WITH_INTERVAL if name in metrics}

    found = bootstrap.intervals(*measured.by_document, summary)
    bounds: dict[str, float | None] = {}
    for name, interval in found.items():
        low, high = (None, None) if interval is None or metrics[name] is None else interval
        bounds |= {f"{name}_low": low, f"{name}_high": high}
    return bounds


def _breakdown(measured: Measured, predicts: Predicts) -> dict[str, list[Row]]:
    """Metrics per group. The variance of every group is taken around the mean of the whole set, so that groups add up."""
    whole = measured.by_document
    centre = whole.shifted.sum(axis=0) / whole.table[:, 0].sum()

    def rows(sums: Sums, named: Callable[[int], Row]) -> list[Row]:
        totals = Totals(*sums, measured.variants, centre)
        summary = totals.summary()
        named_so = ("ce_loss_clean", "ce_loss_sae", "loss_recovered", "explained_variance", "l0")
        kept = applicable({name: summary[name] for name in named_so}, predicts)
        return [
            {"tokens": int(totals.tokens[group]), **{name: number(kept[name][group]) for name in kept}, **named(group)}
            for group in range(len(sums.table))
            if totals.tokens[group] > 0
        ]

    def positions(group: int) -> Row:
        first, last = (0, 0) if group == 0 else (2 ** (group - 1), 2**group - 1)
        return {"first": first, "last": last}

    by_class = [] if measured.by_class is None else rows(measured.by_class, lambda group: {"token_class": CLASSES[group]})
    return {"position": rows(measured.by_position, positions), "token_class": by_class}


def _baseline_rows(settings: EvaluationSettings, compared: Measured, predicts: Predicts) -> list[Row]:
    """The SAE and what it is compared with, on the same tokens."""
    totals = compared.totals()
    if totals.tokens == 0 or (totals.positions == 0 and predicts != "nothing"):
        return []
    shared = {"tokens": int(totals.tokens)}
    found = {
        name: {"name": name, **{key: number(value) for key, value in totals.of(name).items()}, **shared}
        | {"loss_recovered": number(totals.loss_recovered(name))}
        for name in compared.variants
    }
    perfect = {"mse": 0.0, "normalized_mse": 0.0, "explained_variance": 1.0, "cosine_similarity": 1.0, "norm_ratio": 1.0}
    clean = number(totals.ce_loss("clean"))
    recovered = None if found["zero"]["loss_recovered"] is None else 1.0
    identity = {"l0": float(totals.d_in), "ce_loss": clean, "kl_divergence": 0.0, "loss_recovered": recovered}
    found["identity"] = {"name": "identity", **perfect, **identity, **shared}
    return [applicable(found[name], predicts) for name in ("sae", *settings.baselines)]
