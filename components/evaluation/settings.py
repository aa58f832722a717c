"""How an SAE is measured on held-out documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from components.corpus.settings import LabelledSettings
from components.settings import Settings

BaselineName = Literal["identity", "zero", "mean", "pca", "random_directions", "neurons"]


class ProbingSettings(Settings):
    """k-sparse probes: how much of a label a few features say (Gurnee et al. 2023; SAEBench's sparse probing)."""

    tasks: tuple[LabelledSettings, ...] = Field(
        default=(LabelledSettings(), LabelledSettings(source="code_or_prose")), min_length=1
    )
    """Labelled text, one set of probes for each."""

    k: tuple[int, ...] = Field(default=(1, 2, 5, 16), min_length=1)
    """Numbers of features that a probe may read."""

    labels: int = Field(default=10, ge=2)
    """Of a task, at most: those of most documents."""

    passages_per_label: int = Field(default=100, ge=2)
    """At most; from as many documents as there are."""

    passages_per_document: int = Field(default=4, ge=1)
    """At most, for each of its labels, spread evenly over it."""

    passage_tokens: int = Field(default=128, ge=1)
    """Tokens of a passage, at most `corpus.context_length` with the BOS; its activations are averaged."""

    folds: int = Field(default=5, ge=2)
    """Parts into which documents are dealt; each is probed by probes that have seen the others alone."""

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> ProbingSettings:
        titles = [task.title for task in self.tasks]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"evaluation.probing.tasks: two have the name '{title}'; give each a `name` of its own")
        if any(k < 1 for k in self.k) or len(set(self.k)) < len(self.k):
            raise ValueError(f"evaluation.probing.k: {list(self.k)} is not accepted; give different numbers of at least 1")
        if self.passages_per_label < self.folds:
            raise ValueError(
                f"evaluation.probing.passages_per_label: {self.passages_per_label} is less than folds ({self.folds})"
            )
        return self


class MetaStructureSettings(Settings):
    """A dictionary of the decoder's rows (Leask et al. 2025), of SAEBench's width and k."""

    width_ratio: float = Field(default=0.25, gt=0, le=1)
    """Meta-features, as a share of the features that fire."""

    k: int = Field(default=4, ge=1)
    """Meta-features that a row is made of, at most."""

    steps: int = Field(default=500, ge=1)
    """Of its training."""

    batch_size: int = Field(default=1_024, ge=1)
    """Rows in a step."""

    learning_rate: float = Field(default=2e-3, gt=0)
    """Of Adam."""


class AbsorptionSettings(Settings):
    """Features that carry a label in place of those that stand for it (Chanin et al. 2024)."""

    labels: Literal["token_class", "first_letter"] = "token_class"
    """What is looked for: the class of a token's text, or the first letter of a word, for models that know how words are
    spelt (SAEBench's task; it advises against models of under 10^9 parameters)."""

    tokens: int = Field(default=50_000, ge=1)
    """Training tokens that are read."""

    occurrences: int = Field(default=8, ge=1)
    """Of one kind of token, at most."""

    minimum_f1: float = Field(default=0.6, ge=0, le=1)
    """Of a dense probe on kinds of token that it has not seen; a label under it has no direction and is left out."""

    split_f1: float = Field(default=0.03, ge=0, le=1)
    """What a further main feature must add to the F1 of a probe on them."""

    most_main: int = Field(default=10, ge=1)
    """Main features of a label, at most."""


class EvaluationSettings(Settings):
    tokens: int = Field(default=100_000, ge=1)
    """Held-out tokens to measure on, at most; all that `corpus.held_out_tokens` prepared where there are fewer."""

    reference_tokens: int = Field(default=50_000, ge=1)
    """Training tokens that give the mean (of `ce_loss_mean`) and the directions of the PCA baseline."""

    baselines: tuple[BaselineName, ...] = ("identity", "zero", "mean", "pca", "random_directions", "neurons")
    """What the SAE is compared with, each with as many numbers per token as the SAE's L0; empty for none."""

    baseline_tokens: int = Field(default=20_000, ge=1)
    """Held-out tokens, the first of them, for the table of baselines; the SAE's own row there is measured on them too."""

    neighbours: int = Field(default=5, ge=0)
    """Features of the nearest decoder direction to list for each feature; 0 for none (the work grows as d_sae squared)."""

    batch_sequences: int = Field(default=16, ge=1)
    """Sequences in one forward pass, spliced copies included; it decides memory (so many logits), not results."""

    probing: ProbingSettings | None = None
    """k-sparse probes on labelled text, against dense and random ones; none where it is not given, `{}` for the defaults."""

    meta_structure: MetaStructureSettings | None = None
    """How much of the features' directions a few shared ones explain; not measured where it is not given, `{}` for the
    defaults."""

    absorption: AbsorptionSettings | None = None
    """How much of a label other features carry than those that stand for it; not measured where it is not given, `{}` for the
    defaults."""
