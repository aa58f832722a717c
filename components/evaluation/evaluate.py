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
from components.evaluation.kept import KeptSpans, parts, sums_together
from components.evaluation.measurements import (
    Autoencoder,
    Subject,
    baseline_spans,
    measure_all_baselines,
    measure_saes,
    sae_spans,
)
from components.evaluation.record import About, EvaluationRecord, read_evaluation, record_url
from components.evaluation.reference import Reference, reference_statistics
from components.evaluation.results import Evaluation, active_features, finish
from components.evaluation.settings import EvaluationSettings
from components.evaluation.span_totals import SpanSums, merged
from components.evaluation.token_classes import TokenClasses
from components.language_model.hook_points import HookPoint
from components.records import put_record

__all__ = [
    "Autoencoder", "Evaluation", "HeldOut", "Reference", "Subject", "TokenClasses", "evaluate", "evaluate_together",
    "read_evaluation", "reference_statistics",
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
    return evaluate_together(settings, [subject], reference, None if kept is None else [kept])[0]


def evaluate_together(
    settings: EvaluationSettings, subjects: Sequence[Subject], reference: Reference, kept: Sequence[KeptSpans] | None = None
) -> list[Evaluation]:
    """`evaluate` of several SAEs that differ in nothing else: the language model is run once for all that they share. Memory is
    that of one of them, and the SAEs."""
    text, excluded = subjects[0].text, reference.exclusion

    def passed(
        kind: str, cut: Callable[..., list[Span]], measure: Callable[[Span, list[int]], list[SpanSums]]
    ) -> list[list[SpanSums]]:
        """Per SAE those of every span."""
        spans = cut(settings, text, 1 if kept is None else parts(settings.tokens, 1))
        everyone = list(range(len(subjects)))
        found = [
            measure(span, everyone) if kept is None else sums_together(kept, kind, span, partial(measure, span))
            for span in spans
        ]
        return [[sums[place] for sums in found] for place in everyone]

    def saes(span: Span, places: list[int]) -> list[SpanSums]:
        return measure_saes(settings, [subjects[place] for place in places], reference.mean, excluded, span)

    measured = [merged(sums) for sums in passed("sae", sae_spans, saes)]
    l0s = [active_features(settings, sums, text.predicts) for sums in measured]

    def baselines(span: Span, places: list[int]) -> list[SpanSums]:
        chosen = [subjects[place] for place in places]
        return measure_all_baselines(settings, chosen, reference, [l0s[place] for place in places], span)

    compared = passed("baselines", baseline_spans, baselines)
    return [
        finish(settings, sums, merged(others) if others else None, getattr(subject.sae, "W_dec", None), text.predicts)
        for subject, sums, others in zip(subjects, measured, compared, strict=True)
    ]


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
