"""Measure an SAE on held-out documents, through the real language model with the SAE spliced in at its hook point."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from components import storage
from components.evaluation.held_out import HeldOut
from components.evaluation.job import Span
from components.evaluation.kept import KeptSpans, parts
from components.evaluation.measurements import Autoencoder, Subject, baseline_spans, measure_baselines, measure_sae, sae_spans
from components.evaluation.record import About, EvaluationRecord, read_evaluation, record_url
from components.evaluation.reference import Reference, reference_statistics
from components.evaluation.results import Evaluation, active_features, finish
from components.evaluation.settings import EvaluationSettings
from components.evaluation.span_totals import SpanSums, merged
from components.evaluation.token_classes import TokenClasses
from components.language_model.hook_points import HookPoint
from components.records import put_record

__all__ = [
    "Autoencoder", "Evaluation", "HeldOut", "Reference", "TokenClasses", "evaluate", "read_evaluation", "reference_statistics",
]  # fmt: skip

logger = logging.getLogger(__name__)

FILES = ("features.parquet", "report.html", "evaluation.json")


def evaluate(
    settings: EvaluationSettings,
    sae: Autoencoder,
    d_sae: int,
    model: nn.Module,
    point: HookPoint,
    held_out: HeldOut,
    reference: Reference,
    device: torch.device,
    classes: TokenClasses | None = None,
    kept: KeptSpans | None = None,
    reads: tuple[HookPoint, ...] = (),
) -> Evaluation:
    """Everything that is measured of one SAE, by one worker.

    reference: its mean is the one of `ce_loss_mean`, its exclusion holds for what is measured. classes: of the model's
    tokenizer; no breakdown by class without it. kept: where spans outlive an interruption.
    reads: what the SAE reads where that is not `point`.
    Memory: the logits of `settings.batch_sequences` sequences.
    """
    subject = Subject(
        sae=sae, d_sae=d_sae, model=model, point=point, text=held_out, device=device, classes=classes, reads=reads
    )
    excluded = reference.exclusion

    def passed(kind: str, cut: Callable[..., list[Span]], measure: Callable[[Span], SpanSums]) -> list[SpanSums]:
        every = cut(settings, held_out, 1 if kept is None else parts(settings.tokens, 1))
        return [measure(span) if kept is None else kept.sums(kind, span, partial(measure, span)) for span in every]

    measured = merged(passed("sae", sae_spans, lambda span: measure_sae(settings, subject, reference.mean, excluded, span)))
    l0 = active_features(settings, measured)
    compared = passed("baselines", baseline_spans, lambda span: measure_baselines(settings, subject, reference, l0, span))
    return finish(settings, measured, merged(compared) if compared else None, getattr(sae, "W_dec", None))


def write_evaluation(
    url: str,
    digest: str,
    identity: dict[str, Any],
    evaluation: Evaluation,
    device: torch.device,
    about: About,
    warnings: Sequence[str] = (),
) -> EvaluationRecord:
    """Put `features.parquet`, `report.html` and then `evaluation.json` beside the artifact at `url`; returns the record."""
    for warning in warnings:
        logger.warning("evaluate: %s", warning)
    with storage.whole_file(storage.join(url, "features.parquet")) as path:
        pq.write_table(evaluation.features, path, compression="zstd")
    record = EvaluationRecord(
        digest=digest,
        identity=identity,
        metrics=evaluation.metrics,
        breakdown=evaluation.breakdown,
        baselines=evaluation.baselines,
        optional=evaluation.optional,
        about=about,
        device=str(device),
        warnings=tuple(warnings),
    )
    write_report(url, record, evaluation.features, ())
    put_record(record, record_url(url))
    return record


def write_report(url: str, record: EvaluationRecord, features: pa.Table, earlier: Sequence[Mapping[str, Any]]) -> None:
    """Put `report.html` beside the artifact at `url`, over one that is there.

    earlier: SAEs to compare with, each with `name`, `l0`, `explained_variance` and `loss_recovered`.
    """
    from components.evaluation import report  # heavy, for its drawings

    page = report.render(record, features["density"].to_numpy(), earlier)
    storage.put_bytes(page.encode("utf-8"), storage.join(url, "report.html"))
