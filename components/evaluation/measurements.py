"""The two passes of an evaluation through the language model, over a span of text each: the SAE's, and the baselines'."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from components.activations.exclusion import Exclusion
from components.evaluation import baselines
from components.evaluation.baselines import Reconstruction, Rows, Variant
from components.evaluation.features import FeatureSums
from components.evaluation.held_out import HeldOut
from components.evaluation.job import Span, batch_size, spans
from components.evaluation.reference import Reference
from components.evaluation.settings import EvaluationSettings
from components.evaluation.span_totals import SpanSums
from components.evaluation.spliced_pass import Measurement, measure
from components.evaluation.splicing import Splicer, mlp_output
from components.evaluation.token_classes import TokenClasses
from components.language_model.hook_points import HookPoint
from components.sae.features import Features

_MEASURED = ("sae", "zero", "mean")


class Autoencoder(Protocol):
    """Anything with features and reconstructions, every coder first of all; decoder rows `W_dec` `[d_sae, d_out]` are read
    where there are some."""

    def reconstruct(self, x: Tensor) -> tuple[Features, Tensor]:
        """`[n, d_in]` -> features of n tokens, and what is written, `[n, d_out]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured: an SAE in a language model, on a text."""

    sae: Autoencoder
    d_sae: int
    model: nn.Module
    point: HookPoint
    """Where activations are replaced by what the SAE writes."""
    text: HeldOut
    device: torch.device
    classes: TokenClasses | None = None
    """Of the model's tokenizer; no breakdown by class without it."""
    reads: tuple[HookPoint, ...] = ()
    """What the SAE reads, side by side; nothing where that is `point`."""

    def reconstructed(self, x: Tensor) -> tuple[Features, Tensor]:
        with torch.no_grad():
            return self.sae.reconstruct(x)


def sae_spans(settings: EvaluationSettings, text: HeldOut, parts: int) -> list[Span]:
    """Spans for `measure_sae`, at most `parts`."""
    return spans(text, settings.tokens, batch_size(settings.batch_sequences, len(_MEASURED)), parts)


def measure_sae(settings: EvaluationSettings, subject: Subject, mean: Tensor, exclusion: Exclusion, span: Span) -> SpanSums:
    """The SAE, zeros and the mean in place of the activations of a span.

    mean `[d_in]`: of training activations, and the same for every span. exclusion: tokens that do not count.
    """
    features = FeatureSums(subject.d_sae, subject.device)
    mean = mean.to(subject.device)

    def counting(rows: Rows) -> Reconstruction:
        encoded, x_hat = subject.reconstructed(rows.read)
        return Reconstruction(x_hat, features.add(encoded))

    variants: dict[str, Variant] = dict(zip(_MEASURED, (counting, baselines.zero, baselines.constant(mean)), strict=True))
    measurement = Measurement(
        Splicer(subject.model, subject.point, subject.reads),
        variants,
        frozenset({"sae"}),
        mean,
        exclusion,
        subject.text.manifest.context_length,
        subject.classes,
    )
    found = measure(measurement, subject.text, span, settings.batch_sequences, "evaluate")
    return dataclasses.replace(found, features=features.on_cpu(), device=subject.device.type)


def baseline_spans(settings: EvaluationSettings, text: HeldOut, parts: int) -> list[Span]:
    """Spans for `measure_baselines`, at most `parts`; none where there are no baselines."""
    if not settings.baselines:
        return []
    tokens = min(settings.baseline_tokens, settings.tokens)
    return spans(text, tokens, batch_size(settings.batch_sequences, len(_compared(settings))), parts)


def measure_baselines(settings: EvaluationSettings, subject: Subject, reference: Reference, l0: float, span: Span) -> SpanSums:
    """The SAE and what it is compared with, each with `l0` numbers per token, in place of the activations of a span."""
    reference = reference.on(subject.device)
    count = max(1, round(l0))

    def plain(rows: Rows) -> Reconstruction:
        features, x_hat = subject.reconstructed(rows.read)
        return Reconstruction(x_hat, features.active())

    def variant(name: str) -> Variant:
        match name:
            case "mean":
                return baselines.constant(reference.mean)
            case "pca":
                return baselines.principal_components(reference, min(count, reference.d_in))
            case "random_directions":
                return baselines.random_directions(reference, subject.d_sae, count)
            case "neurons":
                return baselines.neurons(reference, mlp_output(subject.model, subject.point), count)
        return plain if name == "sae" else baselines.zero

    compared = _compared(settings)
    measurement = Measurement(
        Splicer(subject.model, subject.point, subject.reads, keep_neurons="neurons" in compared),
        {name: variant(name) for name in compared},
        frozenset(compared),
        reference.mean,
        reference.exclusion,
        subject.text.manifest.context_length,
        None,
    )
    return measure(measurement, subject.text, span, settings.batch_sequences, "baselines")


def _compared(settings: EvaluationSettings) -> tuple[str, ...]:
    """Zeros are always there: `loss_recovered` is a ratio against them. The identity is known without a pass."""
    return ("sae", "zero", *(name for name in ("mean", "pca", "random_directions", "neurons") if name in settings.baselines))
