"""Measure an SAE on held-out documents, through the real language model with the SAE spliced in at its hook point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from components import storage
from components.evaluation import baselines, bootstrap, report
from components.evaluation.baselines import Reconstruction, Rows, Variant
from components.evaluation.features import FeatureSums, feature_table
from components.evaluation.held_out import HeldOut
from components.evaluation.measure import Measured, Measurement, measure
from components.evaluation.metrics import Totals, number
from components.evaluation.reference import Reference, reference_statistics
from components.evaluation.settings import EvaluationSettings
from components.evaluation.splicing import Splicer, mlp_output
from components.evaluation.token_classes import CLASSES, TokenClasses
from components.hardware import keep_freed_memory
from components.language_model.hook_points import HookPoint
from components.settings import UserError, digest

__all__ = ["Autoencoder", "Evaluation", "HeldOut", "Reference", "TokenClasses", "evaluate", "reference_statistics"]

# Raised when the same SAE and text would no longer give the same metrics.
METRICS_VERSION = 2
FILES = ("features.parquet", "report.html", "evaluation.json")
WITH_INTERVAL = (
    "explained_variance", "loss_recovered", "loss_recovered_mean", "l0", "mse", "kl_divergence",
    "ce_loss_clean", "ce_loss_sae", "ce_loss_zero", "ce_loss_mean",
)  # fmt: skip
"""Metrics that come with `_low` and `_high`, the bounds of their 95% confidence interval over documents."""


class Autoencoder(Protocol):
    """Anything with features and reconstructions: an SAE, or a baseline to compare it with.

    One whose reconstruction needs more than the features (the norm that it took off its input) also has
    `reconstruct(x) -> (features, x_hat)`; decoder rows `W_dec` `[d_sae, d_in]` are read where there are some.
    """

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, features: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    metrics: dict[str, Any]
    """Flat: names of the README's table to numbers, None where one is not defined."""
    breakdown: dict[str, list[dict[str, Any]]]
    """`position` and `token_class`: a row per group with its tokens and metrics."""
    baselines: list[dict[str, Any]]
    """A row per reconstruction, the SAE's first, all on the same tokens."""
    features: pa.Table
    """A row per feature."""


def evaluation_identity(
    settings: EvaluationSettings, weights_sha256: str, token_digest: str, model: dict[str, Any], hook_point: str
) -> dict[str, Any]:
    """Everything that decides the metrics (on one kind of device)."""
    return {
        "kind": "evaluation",
        "metrics_version": METRICS_VERSION,
        "weights": weights_sha256,
        "tokens": token_digest,
        "model": model,
        "hook_point": hook_point,
        "settings": settings.model_dump(mode="json", exclude={"batch_sequences"}),
    }


def read_evaluation(url: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation beside the artifact at `url`, None unless it is the one of `identity`."""
    record = storage.read_json_if_present(storage.join(url, "evaluation.json"))
    return record if record is not None and record["digest"] == digest(identity) else None


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
    """Everything that is measured of one SAE.

    reference: its mean is the one of `ce_loss_mean`, its median norm that of `settings.exclude_norms_above`. classes: of
    the model's tokenizer; no breakdown by class without it. Memory: the logits of `settings.batch_sequences` sequences.
    """
    keep_freed_memory()
    limit = None if settings.exclude_norms_above is None else settings.exclude_norms_above * reference.median_norm
    features = FeatureSums(d_sae, device)
    splicer = Splicer(model, point)
    length = held_out.manifest["context_length"]

    def counting(rows: Rows) -> Reconstruction:
        encoded, x_hat = _reconstructed(sae, rows.x)
        return Reconstruction(x_hat, features.add(encoded))

    fixed = {"zero": baselines.zero, "mean": baselines.constant(reference.mean)}
    measurement = Measurement(splicer, {"sae": counting, **fixed}, frozenset({"sae"}), reference.mean, limit, length, classes)
    measured = measure(measurement, held_out, settings.tokens, settings.batch_sequences, "evaluate")
    totals = measured.totals()
    if totals.tokens == 0 or totals.positions == 0:
        raise UserError(
            f"evaluation: no held-out token is left to measure on; raise evaluation.tokens ({settings.tokens}) or "
            f"evaluation.exclude_norms_above ({settings.exclude_norms_above})"
        )
    metrics: dict[str, Any] = {name: number(value) for name, value in totals.summary().items()}
    metrics |= _bounds(measured, metrics)
    metrics["dead_fraction"] = features.dead_fraction
    metrics["evaluation_tokens"] = int(totals.tokens)
    metrics["evaluation_documents"] = measured.documents
    table = feature_table(features, getattr(sae, "W_dec", None), settings.neighbours)
    rows = _baseline_rows(settings, sae, d_sae, model, point, held_out, reference, limit, metrics["l0"])
    return Evaluation(metrics=metrics, breakdown=_breakdown(measured), baselines=rows, features=table)


def write_evaluation(
    url: str, identity: dict[str, Any], evaluation: Evaluation, device: torch.device, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Put `features.parquet`, `report.html` and then `evaluation.json` beside the artifact at `url`; returns the record.

    about: what the report says of the SAE (see `report.render`).
    """
    with storage.whole_file(storage.join(url, "features.parquet")) as path:
        pq.write_table(evaluation.features, path, compression="zstd")
    record = {
        "digest": digest(identity),
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


def _reconstructed(sae: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if hasattr(sae, "reconstruct"):
            features, x_hat = sae.reconstruct(x)
            return features, x_hat
        features = sae.encode(x)
        return features, sae.decode(features)


def _bounds(measured: Measured, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """`<metric>_low` and `<metric>_high` of every metric with an interval."""

    def summary(table: np.ndarray, shifted: np.ndarray) -> dict[str, np.ndarray]:
        values = Totals(table, shifted, measured.variants).summary()
        return {name: values[name] for name in WITH_INTERVAL}

    found = bootstrap.intervals(*measured.rows(measured.by_document), summary)
    bounds: dict[str, float | None] = {}
    for name, interval in found.items():
        low, high = (None, None) if interval is None or metrics[name] is None else interval
        bounds |= {f"{name}_low": low, f"{name}_high": high}
    return bounds


def _breakdown(measured: Measured) -> dict[str, list[dict[str, Any]]]:
    """Metrics per group. The variance of every group is taken around the mean of the whole set, so that groups add up."""
    whole = measured.rows(measured.by_document)
    centre = whole[1].sum(axis=0) / whole[0][:, 0].sum()

    def rows(sums: tuple[np.ndarray, np.ndarray]) -> list[dict[str, Any]]:
        totals = Totals(*sums, measured.variants, centre)
        summary = totals.summary()
        kept = ("ce_loss_clean", "ce_loss_sae", "loss_recovered", "explained_variance", "l0")
        return [
            {"group": group, "tokens": int(totals.tokens[group]), **{name: number(summary[name][group]) for name in kept}}
            for group in range(len(sums[0]))
            if totals.tokens[group] > 0
        ]

    position = rows(measured.rows(measured.by_position))
    for row in position:
        group = row.pop("group")
        row["first"], row["last"] = (0, 0) if group == 0 else (2 ** (group - 1), 2**group - 1)
    by_class = [] if measured.by_class is None else rows(measured.rows(measured.by_class))
    for row in by_class:
        row["token_class"] = CLASSES[row.pop("group")]
    return {"position": position, "token_class": by_class}


def _baseline_rows(
    settings: EvaluationSettings,
    sae: Autoencoder,
    d_sae: int,
    model: nn.Module,
    point: HookPoint,
    held_out: HeldOut,
    reference: Reference,
    limit: float | None,
    l0: float,
) -> list[dict[str, Any]]:
    """The SAE and what it is compared with, on the first `settings.baseline_tokens` tokens."""
    chosen = set(settings.baselines)
    if not chosen:
        return []
    count = min(max(1, round(l0)), reference.d_in)

    def plain(rows: Rows) -> Reconstruction:
        features, x_hat = _reconstructed(sae, rows.x)
        return Reconstruction(x_hat, (features > 0).sum(dim=1))

    # zero is always measured: loss_recovered is a ratio against it
    variants: dict[str, Variant] = {"sae": plain, "zero": baselines.zero}
    if "mean" in chosen:
        variants["mean"] = baselines.constant(reference.mean)
    if "pca" in chosen:
        variants["pca"] = baselines.principal_components(reference, count)
    if "random_directions" in chosen:
        variants["random_directions"] = baselines.random_directions(reference, d_sae, max(1, round(l0)))
    if "neurons" in chosen:
        variants["neurons"] = baselines.neurons(reference, mlp_output(model, point), max(1, round(l0)))
    splicer = Splicer(model, point, keep_neurons="neurons" in chosen)
    measurement = Measurement(
        splicer, variants, frozenset(variants), reference.mean, limit, held_out.manifest["context_length"], None
    )
    tokens = min(settings.baseline_tokens, settings.tokens)
    measured = measure(measurement, held_out, tokens, settings.batch_sequences, "baselines")
    totals = measured.totals()
    if totals.tokens == 0 or totals.positions == 0:
        return []
    shared = {"tokens": int(totals.tokens)}
    found = {
        name: {"name": name, **{key: number(value) for key, value in totals.of(name).items()}, **shared}
        | {"loss_recovered": number(totals.loss_recovered(name))}
        for name in variants
    }
    perfect = {"mse": 0.0, "normalized_mse": 0.0, "explained_variance": 1.0, "cosine_similarity": 1.0, "norm_ratio": 1.0}
    clean = number(totals.ce_loss("clean"))
    recovered = None if found["zero"]["loss_recovered"] is None else 1.0
    identity = {"l0": float(reference.d_in), "ce_loss": clean, "kl_divergence": 0.0, "loss_recovered": recovered}
    found["identity"] = {"name": "identity", **perfect, **identity, **shared}
    return [found[name] for name in ("sae", *settings.baselines)]
