"""SAEBench's `core` result of a coder: what our evaluation holds under SAEBench's names, and the rest in one more pass.

The layout is that of SAEBench 0.6.0 (`sae_bench/evals/core/eval_output.py`). Its formulas hold where they are right; where they
are not, the right value is written and `eval_result_unstructured` says so. What is not defined is -1, as SAEBench has it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.activations.dataset.forward import counted_tokens
from components.activations.exclusion import Exclusion
from components.evaluation import baselines
from components.evaluation.baselines import Reconstruction, Rows
from components.evaluation.features import nearest_rows
from components.evaluation.held_out import right_padded
from components.evaluation.job import Span
from components.evaluation.measurements import Subject
from components.evaluation.metrics import Totals
from components.evaluation.record import EvaluationRecord
from components.evaluation.spliced_pass import Measurement, measure
from components.evaluation.splicing import Splicer
from components.language_model.hook_points import capture

NOTES = {
    "explained_variance": "1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 over all tokens; SAEBench 0.6.0 squares x before it "
    "takes the mean",
    "explained_variance_legacy": "SAEBench's old formula, the mean over tokens of 1 - ||x - x_hat||^2 / ||x - mean||^2, with "
    "the mean of all tokens and not of each batch",
    "mse": "per token and dimension; SAEBench 0.6.0 divides the squared error by the number of tokens in its batch",
    "relative_reconstruction_bias": "a ratio of sums over all tokens, and no mean of batches' ratios",
    "special tokens": "BOS, padding and excluded tokens keep their own activation in every pass, under zero ablation too, and "
    "are in no sum",
    "token_stats": "tokens that were counted, in both",
    "-1": "not defined",
}
_MISSING = -1.0


@dataclass(frozen=True, kw_only=True)
class CoreSums:
    """Over the counted tokens of the evaluation: what its record does not hold."""

    prompts: int
    """Sequences with a counted token."""
    means: dict[str, float]
    """Means per token, `kl_zero` per predicted token; `squared_out` is of `||x_hat||^2`, `product` of `x . x_hat`."""
    prompts_fired: np.ndarray
    """In how many sequences each feature fires, `[d_sae]`."""


def measure_core(tokens: int, subject: Subject, exclusion: Exclusion) -> CoreSums:
    """One pass over the first `tokens` held-out tokens, in float64 sums, a sequence at a time; before it, one below the hook
    point for the mean."""
    mean = _mean(tokens, subject, exclusion)
    sums = dict.fromkeys(("l2_norm_in", "l2_norm_out", "l2_ratio", "squared_out", "product", "legacy"), 0.0)
    fired = torch.zeros(subject.d_sae, dtype=torch.int64, device=subject.device)
    prompts = 0

    def watching(rows: Rows) -> Reconstruction:
        nonlocal prompts
        features, x_hat = subject.reconstructed(rows.x)
        x, y = rows.x.double(), x_hat.double()
        norms, norms_out = x.norm(dim=1), y.norm(dim=1)
        around = (x - mean).square().sum(dim=1)
        found = {
            "l2_norm_in": norms,
            "l2_norm_out": norms_out,
            "l2_ratio": norms_out / torch.where(norms < 1e-4, 1.0, norms),
            "squared_out": norms_out.square(),
            "product": (x * y).sum(dim=1),
            "legacy": 1 - (x - y).square().sum(dim=1) / around,
        }
        for name, values in found.items():
            sums[name] += values.sum().item()
        fired.add_(features.fired() > 0)
        prompts += 1
        return baselines.zero(rows)

    measurement = Measurement(
        Splicer(subject.model, subject.point),
        {"zero": watching},
        frozenset({"zero"}),
        mean.to(torch.float32),
        exclusion,
        subject.text.manifest.context_length,
        None,
    )
    span = Span(range(subject.text.manifest.splits["held_out"].sequences), tokens)
    by_document = measure(measurement, subject.text, span, 1, "saebench").by_document
    totals = Totals(by_document.table.sum(axis=0), by_document.shifted.sum(axis=0), ("zero",))
    means = {name: value / float(totals.tokens) for name, value in sums.items()}
    means["kl_zero"] = float(totals.of("zero")["kl_divergence"])
    return CoreSums(prompts=prompts, means=means, prompts_fired=fired.cpu().numpy())


def core_result(
    record: EvaluationRecord,
    density: np.ndarray,
    mean_activation: np.ndarray,
    sums: CoreSums,
    weights: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole file, as plain JSON.

    density, mean_activation: `[d_sae]`, of the feature table. weights: `W_enc` `[d_in, d_sae]`, `W_dec` `[d_sae, d_in]` and
    `b_enc` (of a gated coder its `b_mag`). about: `release`, `sae_cfg_dict`, and fields of `eval_config`.
    """
    metrics, means, tokens = record.metrics, sums.means, record.tokens
    kl_zero, kl_sae = means["kl_zero"], metrics["kl_divergence"]
    l1 = float((density * mean_activation).sum())
    details = _features(density, sums.prompts_fired, tokens, weights)
    categories: dict[str, dict[str, Any]] = {
        "model_behavior_preservation": {
            "kl_div_score": None if kl_sae is None or not kl_zero > 0 else (kl_zero - kl_sae) / kl_zero,
            "kl_div_with_ablation": kl_zero,
            "kl_div_with_sae": kl_sae,
        },
        "model_performance_preservation": {
            "ce_loss_score": metrics["loss_recovered"],
            "ce_loss_with_ablation": metrics["ce_loss_zero"],
            "ce_loss_with_sae": metrics["ce_loss_sae"],
            "ce_loss_without_sae": metrics["ce_loss_clean"],
        },
        "reconstruction_quality": {
            "explained_variance": metrics["explained_variance"],
            "explained_variance_legacy": means["legacy"],
            "mse": metrics["mse"],
            "cossim": metrics["cosine_similarity"],
        },
        "shrinkage": {
            "l2_norm_in": means["l2_norm_in"],
            "l2_norm_out": means["l2_norm_out"],
            "l2_ratio": means["l2_ratio"],
            "relative_reconstruction_bias": means["squared_out"] / means["product"] if means["product"] else None,
        },
        "sparsity": {"l0": metrics["l0"], "l1": l1},
        "token_stats": {"total_tokens_eval_reconstruction": tokens, "total_tokens_eval_sparsity_variance": tokens},
        "misc_metrics": _frequencies(density, details),
    }
    configured = {
        "batch_size_prompts": 1,
        "n_eval_reconstruction_batches": sums.prompts,
        "n_eval_sparsity_variance_batches": sums.prompts,
        **{f"compute_{name}": True for name in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")},
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }
    named = ("model_name", "llm_dtype", "dataset", "context_size")
    return {
        "eval_type_id": "core",
        "eval_config": {**{name: about[name] for name in named}, **configured},
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, record.digest)),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {name: _defined(values) for name, values in categories.items()},
        "eval_result_details": [_defined(row) for row in details],
        "sae_bench_commit_hash": "Unknown",  # as SAEBench itself writes where there is no checkout
        "sae_lens_id": record.about.name,
        "sae_lens_release_id": about["release"],
        "sae_lens_version": None,
        "sae_cfg_dict": about["sae_cfg_dict"],
        "eval_result_unstructured": {"written_by": "sae-foundry", "evaluation": record.digest, "notes": NOTES},
    }


def file_name(result: Mapping[str, Any]) -> str:
    """As SAEBench names it."""
    return f"{result['sae_lens_release_id']}_{result['sae_lens_id']}_eval_results.json".replace("/", "_")


def _mean(tokens: int, subject: Subject, exclusion: Exclusion) -> Tensor:
    """Of the counted activations, float64 `[d_in]`."""
    limit = exclusion.norm_limits.get(str(subject.point))
    total, count = torch.zeros((), dtype=torch.float64, device=subject.device), 0
    for plain in subject.text.batches(tokens, 16):
        block = right_padded(plain)
        ids = torch.tensor(block.tokens).to(subject.device).long()
        x = capture(subject.model, [subject.point], {"input_ids": ids})[subject.point]
        x = x[torch.tensor(counted_tokens(block, exclusion)).to(subject.device)].double()
        if limit is not None:
            x = x[x.norm(dim=1) <= limit]
        total, count = total + x.sum(dim=0), count + len(x)
    return total / count


def _features(density: np.ndarray, prompts: np.ndarray, tokens: int, weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    encoder, decoder = weights["W_enc"].double().T, weights["W_dec"].double()
    cosines = torch.nn.functional.cosine_similarity(encoder, decoder, dim=1)
    several = len(decoder) > 1
    fired = np.rint(density * tokens)
    columns: dict[str, Any] = {
        "feature_density": density,
        "consistent_activation_heuristic": np.divide(fired, prompts, out=np.full(len(fired), np.nan), where=prompts > 0),
        "encoder_bias": weights["b_enc"].double().cpu().numpy(),
        "encoder_norm": encoder.norm(dim=1).cpu().numpy(),
        "encoder_decoder_cosine_sim": cosines.cpu().numpy(),
        "max_decoder_cosine_sim": nearest_rows(decoder, 1)[1][:, 0] if several else np.full(1, np.nan),
        "max_encoder_cosine_sim": nearest_rows(encoder, 1)[1][:, 0] if several else np.full(1, np.nan),
    }
    return [
        {"index": feature, **{name: float(values[feature]) for name, values in columns.items()}}
        for feature in range(len(density))
    ]


def _frequencies(density: np.ndarray, details: list[dict[str, Any]]) -> dict[str, float]:
    whole = density.sum()

    def over(limit: float) -> float:
        return float(density[density > limit].sum() / whole) if whole > 0 else 0.0

    return {
        "freq_over_1_percent": float((density > 0.01).mean()),
        "freq_over_10_percent": float((density > 0.1).mean()),
        "normalized_freq_over_1_percent": over(0.01),
        "normalized_freq_over_10_percent": over(0.1),
        "average_max_encoder_cosine_sim": float(np.mean([row["max_encoder_cosine_sim"] for row in details])),
        "average_max_decoder_cosine_sim": float(np.mean([row["max_decoder_cosine_sim"] for row in details])),
        "frac_alive": float((density > 0).mean()),
    }


def _defined(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _MISSING if value is None or not np.isfinite(value) else value for name, value in values.items()}
