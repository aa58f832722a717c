"""Measure an SAE on held-out documents, through the real language model with the SAE spliced in at its hook point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from components import storage
from components.evaluation import report
from components.evaluation.held_out import HeldOut
from components.evaluation.measurements import Autoencoder, Subject, baseline_spans, measure_baselines, measure_sae, sae_spans
from components.evaluation.reference import Reference, reference_statistics
from components.evaluation.results import Evaluation, active_features, finish
from components.evaluation.settings import EvaluationSettings
from components.evaluation.span_totals import merged
from components.evaluation.token_classes import TokenClasses
from components.language_model.hook_points import HookPoint

__all__ = ["Autoencoder", "Evaluation", "HeldOut", "Reference", "TokenClasses", "evaluate", "reference_statistics"]

FILES = ("features.parquet", "report.html", "evaluation.json")


def read_evaluation(url: str, digest: str) -> dict[str, Any] | None:
    """The evaluation beside the artifact at `url`, None unless it is the one of that digest."""
    record = storage.read_json_if_present(storage.join(url, "evaluation.json"))
    return record if record is not None and record["digest"] == digest else None


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
) -> Evaluation:
    """Everything that is measured of one SAE, by one worker: each pass has a single span.

    reference: its mean is the one of `ce_loss_mean`, its median norm that of `settings.exclude_norms_above`. classes: of
    the model's tokenizer; no breakdown by class without it. Memory: the logits of `settings.batch_sequences` sequences.
    """
    subject = Subject(sae=sae, d_sae=d_sae, model=model, point=point, text=held_out, device=device, classes=classes)
    limit = settings.norm_limit(reference.median_norm)
    parts = [measure_sae(settings, subject, reference.mean, limit, span) for span in sae_spans(settings, held_out, 1)]
    measured = merged(parts)
    l0 = active_features(settings, measured)
    parts = [measure_baselines(settings, subject, reference, l0, span) for span in baseline_spans(settings, held_out, 1)]
    return finish(settings, measured, merged(parts) if parts else None, getattr(sae, "W_dec", None))


def write_evaluation(
    url: str, digest: str, identity: dict[str, Any], evaluation: Evaluation, device: torch.device, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Put `features.parquet`, `report.html` and then `evaluation.json` beside the artifact at `url`; returns the record.

    about: what the report says of the SAE (see `report.render`).
    """
    with storage.whole_file(storage.join(url, "features.parquet")) as path:
        pq.write_table(evaluation.features, path, compression="zstd")
    record = {
        "digest": digest,
        "identity": identity,
        "metrics": evaluation.metrics,
        "breakdown": evaluation.breakdown,
        "baselines": evaluation.baselines,
        "about": dict(about),
        "device": str(device),
    }
    write_report(url, record, evaluation.features, ())
    storage.put_json(record, storage.join(url, "evaluation.json"))
    return record


def write_report(url: str, record: Mapping[str, Any], features: pa.Table, earlier: Sequence[Mapping[str, Any]]) -> None:
    """Put `report.html` beside the artifact at `url`, over one that is there.

    earlier: SAEs to compare with, each with `name`, `l0`, `explained_variance` and `loss_recovered`.
    """
    page = report.render(record, features["density"].to_numpy(), earlier)
    storage.put_bytes(page.encode("utf-8"), storage.join(url, "report.html"))
