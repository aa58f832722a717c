"""The two passes of an evaluation through the language model, over a span of text each: the SAE's, and the baselines'."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
    head: nn.Module | None = None
    """The image classifier that `model` is the body of."""

    def splicer(self, keep_neurons: bool = False) -> Splicer:
        return Splicer(self.model, self.point, self.reads, keep_neurons, self.text.predicts != "nothing", self.head)

    def reconstructed(self, x: Tensor) -> tuple[Features, Tensor]:
        with torch.no_grad():
            return self.sae.reconstruct(x)


def sae_spans(settings: EvaluationSettings, text: HeldOut, parts: int) -> list[Span]:
    """Spans for `measure_sae`, at most `parts`."""
    return spans(text, settings.tokens, batch_size(settings.batch_sequences, len(_MEASURED)), parts)


def measure_sae(settings: EvaluationSettings, subject: Subject, mean: Tensor, exclusion: Exclusion, span: Span) -> SpanSums:
    """The SAE, zeros and the mean in place of the activations of a span; the rest as of `measure_saes`."""
    return measure_saes(settings, [subject], mean, exclusion, span)[0]


def measure_saes(
    settings: EvaluationSettings, subjects: Sequence[Subject], mean: Tensor, exclusion: Exclusion, span: Span
) -> list[SpanSums]:
    """Several SAEs, zeros and the mean in place of the activations of a span: one pass for what does not depend on the SAE.

    The subjects differ by their SAEs alone. mean `[d_in]`: of training activations, and the same for every span. exclusion:
    tokens that do not count.
    """
    first = subjects[0]
    counts = [FeatureSums(subject.d_sae, subject.device) for subject in subjects]
    mean = mean.to(first.device)

    def counting(number: int, rows: Rows) -> Reconstruction:
        encoded, x_hat = subjects[number].reconstructed(rows.read)
        return Reconstruction(x_hat, counts[number].add(encoded))

    saes: dict[str, Variant] = {f"sae {number}": partial(counting, number) for number in range(len(subjects))}
    shared: dict[str, Variant] = {"zero": baselines.zero, "mean": baselines.constant(mean)}
    measurement = Measurement(
        first.splicer(),
        {"sae 0": saes["sae 0"], **shared, **saes},
        frozenset(saes),
        mean,
        exclusion,
        first.text.manifest.context_length,
        first.classes,
        at_once=len(_MEASURED),
    )
    found = measure(measurement, first.text, span, settings.batch_sequences, "evaluate")
    found = dataclasses.replace(found, device=first.device.type)
    return [
        found.of({"sae": name, **{name: name for name in shared}}, features.on_cpu())
        for name, features in zip(saes, counts, strict=True)
    ]


def baseline_spans(settings: EvaluationSettings, text: HeldOut, parts: int) -> list[Span]:
    """Spans for `measure_baselines`, at most `parts`; none where there are no baselines."""
    if not settings.baselines:
        return []
    tokens = min(settings.baseline_tokens, settings.tokens)
    return spans(text, tokens, batch_size(settings.batch_sequences, len(_compared(settings))), parts)


def measure_baselines(settings: EvaluationSettings, subject: Subject, reference: Reference, l0: float, span: Span) -> SpanSums:
    """The SAE and what it is compared with, each with `l0` numbers per token, in place of the activations of a span."""
    return measure_all_baselines(settings, [subject], reference, [l0], span)[0]


def measure_all_baselines(
    settings: EvaluationSettings, subjects: Sequence[Subject], reference: Reference, l0s: Sequence[float], span: Span
) -> list[SpanSums]:
    """`measure_baselines` of several SAEs; what they are compared with is measured once where it is the same."""
    first, reference = subjects[0], reference.on(subjects[0].device)

    def plain(subject: Subject, rows: Rows) -> Reconstruction:
        features, x_hat = subject.reconstructed(rows.read)
        return Reconstruction(x_hat, features.active())

    def variant(name: str, subject: Subject, count: int) -> Variant:
        match name:
            case "mean":
                return baselines.constant(reference.mean)
            case "pca":
                return baselines.principal_components(reference, count)
            case "random_directions":
                return baselines.random_directions(reference, subject.d_sae, count)
            case "neurons":
                return baselines.neurons(reference, mlp_output(subject.model, subject.point), count)
        return partial(plain, subject) if name == "sae" else baselines.zero

    compared = _compared(settings)
    variants: dict[str, Variant] = {}
    named = []
    for number, (subject, l0) in enumerate(zip(subjects, l0s, strict=True)):
        count = max(1, round(l0))
        capped = min(count, reference.d_in)
        full = {
            "sae": f"sae {number}", "pca": f"pca {capped}", "neurons": f"neurons {count}",
            "random_directions": f"random_directions {subject.d_sae} {count}",
        }  # fmt: skip
        named.append({name: full.get(name, name) for name in compared})
        for name, key in named[-1].items():
            if key not in variants:
                variants[key] = variant(name, subject, capped if name == "pca" else count)
    measurement = Measurement(
        first.splicer(keep_neurons="neurons" in compared),
        variants,
        frozenset(variants),
        reference.mean,
        reference.exclusion,
        first.text.manifest.context_length,
        None,
        at_once=len(compared),
    )
    found = measure(measurement, first.text, span, settings.batch_sequences, "baselines")
    return [found.of(names) for names in named]


def _compared(settings: EvaluationSettings) -> tuple[str, ...]:
    """Zeros are always there: `loss_recovered` is a ratio against them. The identity is known without a pass."""
    return ("sae", "zero", *(name for name in ("mean", "pca", "random_directions", "neurons") if name in settings.baselines))
