"""What names everything that the line makes: the one module in which digests are made.

An identity is the fields that decide what a thing is, by name and with resolved values: contents and not patterns, commits and
not branches, sizes and not factors. A field is in it because it is listed here (a coder's own: beside its architecture). One
that was added later is left out while it has its default, so that what existed before keeps its name. Device, batch sizes of
forward passes, numbers of workers, logging and checkpoint intervals are never in one.

Each kind has a version, raised on purpose when the same fields would no longer give the same thing; `tests/golden` notices
when it should have been.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from components.activations.settings import ActivationSettings, ExcludeSettings
from components.corpus.duplicates import near_duplicates_identity
from components.corpus.settings import CorpusSettings
from components.evaluation.settings import EvaluationSettings
from components.interpretation.settings import InterpretationSettings
from components.settings import digest as content_digest
from components.training.settings import TrainingSettings

VERSIONS = {"tokens": 3, "activations": 3, "coder": 3, "evaluation": 3, "evaluation_set": 2, "run": 2, "interpretation": 2}


@dataclass(frozen=True)
class Fields:
    """Where every field of a settings class stands."""

    always: tuple[str, ...]
    later: tuple[str, ...] = ()
    """Added after the version: in an identity only where they differ from their default."""
    resolved: tuple[str, ...] = ()
    """In an identity as what they stand for: a listing, a commit, a list of names."""
    without_effect: tuple[str, ...] = ()

    def of(self, settings: BaseModel) -> dict[str, Any]:
        values, known = settings.model_dump(mode="json"), type(settings).model_fields
        changed = [name for name in self.later if getattr(settings, name) != known[name].get_default(call_default_factory=True)]
        return {name: values[name] for name in (*self.always, *changed)}


CORPUS = Fields(
    always=("held_out_fraction", "context_length", "packing", "bos", "train_tokens", "held_out_tokens"),
    resolved=(
        "source", "paths", "dataset", "subset", "dataset_split", "revision", "text_column", "messages_column", "chat_template",
        "mixture", "image_column", "prompt", "near_duplicates", "split_special_tokens",
    ),
)  # fmt: skip
IMAGES = Fields(always=("held_out_fraction", "train_tokens", "held_out_tokens"))
ACTIVATIONS = Fields(
    always=("split", "dtype", "compression", "rows_per_shard", "rows_per_group"),
    later=("exclude", "mode", "generation_tokens", "generations_mixed"),
    resolved=("hook_points",),
    without_effect=("sequences_per_chunk", "shuffle_workers", "disk_bytes"),
)
TRAINING = Fields(
    always=(
        "tokens", "batch_size", "learning_rate", "learning_rate_warmup", "learning_rate_decay", "adam_betas",
        "clip_gradient_norm", "autocast", "dead_after_tokens",
    ),
    later=("dead_after_share", "gradient_accumulation_steps"),
    resolved=("hook_point", "target", "crosscoder", "start_from"),
    without_effect=("checkpoint_tokens", "checkpoint_minutes", "checkpoints_kept", "stop_seconds", "log_tokens"),
)  # fmt: skip
EVALUATION = Fields(
    always=("tokens", "reference_tokens", "baselines", "baseline_tokens", "neighbours"),
    later=("meta_structure", "absorption"),
    resolved=("probing",),
    without_effect=("batch_sequences",),
)
INTERPRETATION = Fields(
    always=("tokens", "examples", "drawn", "quantiles", "logits"), without_effect=("explainer", "safety", "prompt_sets")
)
COMPARED = Fields(always=("tokens", "reference_tokens"))
"""What must be the same for two evaluations to be compared: what is listed beside the metrics changes none of them."""


def identity(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "version": VERSIONS[kind], **fields}


def digest(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name an identity."""
    return content_digest(identity)


def token_identity(
    settings: CorpusSettings, content: Mapping[str, Any], tokenizer: str, seed: int, chat_date: str | None = None
) -> dict[str, Any]:
    """content: of the corpus (see `corpus_content`). tokenizer: the digest of its files, of an image corpus the processor's.
    chat_date: that a chat template prints, where one does."""
    fields = (IMAGES if settings.source == "images" else CORPUS).of(settings)
    near = near_duplicates_identity(settings.near_duplicates)
    dated = {} if chat_date is None else {"chat_date": chat_date}
    return identity(
        "tokens", corpus=dict(content), near_duplicates=near, tokenizer=tokenizer, seed=seed, settings=fields, **dated
    )


def activation_identity(
    settings: ActivationSettings, tokens: str, model: Mapping[str, Any], hook_points: Sequence[str], seed: int
) -> dict[str, Any]:
    fields = ACTIVATIONS.of(settings)
    return identity("activations", tokens=tokens, model=dict(model), hook_points=list(hook_points), seed=seed, settings=fields)


def generation_identity(activations: Mapping[str, Any], number: int, count: int, pieces: int) -> dict[str, Any]:
    """Of the dataset of some of the sequences, see `online.production.Cut`. activations: the identity of all generations
    together."""
    return {**activations, "generation": {"number": number, "of": count, "pieces": pieces}}


def coder_identity(
    settings: TrainingSettings,
    coder: Mapping[str, Any],
    activations: str,
    reads: Sequence[str],
    writes: Sequence[str],
    seed: int,
    rerun: str | None,
    start: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """coder: `CoderSettings.identity`. rerun: another word, another training of the same. start: `Start.identity` of the coder
    that training continues from, None for new weights."""
    again = {} if rerun is None else {"rerun": rerun}
    begun = {} if start is None else {"start": dict(start)}
    return identity(
        "coder", activations=activations, reads=list(reads), writes=list(writes), seed=seed, coder=dict(coder),
        training=TRAINING.of(settings), **again, **begun,
    )  # fmt: skip


def excluded(settings: ActivationSettings) -> dict[str, Any]:
    """The tokens that do not count, as a field of an identity."""
    return {} if settings.exclude == ExcludeSettings() else {"exclude": settings.exclude.model_dump(mode="json")}


def placed(reads: Sequence[str], writes: Sequence[str]) -> dict[str, Any]:
    """Where a coder reads and writes, as fields of an identity."""
    return {"hook_point": reads[0]} if len(reads) == 1 and reads == writes else {"reads": list(reads), "writes": list(writes)}


def coder_on_text_identity(
    settings: EvaluationSettings | InterpretationSettings,
    weights_sha256: str,
    tokens: str,
    model: Mapping[str, Any],
    place: Mapping[str, Any],
    stored: ActivationSettings,
    labelled: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Of an evaluation or an interpretation: what a coder does on held-out text in a language model. place: see `placed`.
    labelled: what decides the text of each probing task."""
    kind, fields = (
        ("evaluation", EVALUATION) if isinstance(settings, EvaluationSettings) else ("interpretation", INTERPRETATION)
    )
    probed = probing(settings, labelled) if isinstance(settings, EvaluationSettings) else {}
    return identity(
        kind, weights=weights_sha256, tokens=tokens, model=dict(model), settings=fields.of(settings), **place, **probed,
        **excluded(stored),
    )  # fmt: skip


def probing(settings: EvaluationSettings, labelled: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Probes, as a field of an identity, where there are any: by the contents of their text, and not by its paths."""
    if settings.probing is None:
        return {}
    tasks = [{"name": task.title, **content} for task, content in zip(settings.probing.tasks, labelled, strict=True)]
    return {"probing": {**settings.probing.model_dump(mode="json", exclude={"tasks"}), "tasks": tasks}}


def evaluation_set_identity(
    settings: EvaluationSettings,
    tokens: Mapping[str, Any],
    model: Mapping[str, Any],
    place: Mapping[str, Any],
    counted: int,
    stored: ActivationSettings,
) -> dict[str, Any]:
    """What two coders must share to be compared: held-out text, language model, hook point and way of measuring. How much text
    was prepared for training is no part of it. counted: tokens that were measured."""
    settled = {name: value for name, value in tokens["settings"].items() if name != "train_tokens"}
    text = {**tokens, "settings": settled}
    return identity(
        "evaluation_set", metrics=VERSIONS["evaluation"], text=content_digest(text), model=dict(model), counted=counted,
        settings=COMPARED.of(settings), **place, **excluded(stored),
    )  # fmt: skip


def run_identity(
    name: str,
    coder: str,
    tokens: str,
    settings: EvaluationSettings,
    model: str,
    experiment: str,
    labelled: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """All that a run's results depend on; where it is stored is left out. model: the registered one. labelled: see
    `coder_on_text_identity`."""
    return identity(
        "run", name=name, coder=coder, tokens=tokens, metrics=VERSIONS["evaluation"], evaluation=EVALUATION.of(settings),
        registered_model=model, experiment=experiment, **probing(settings, labelled),
    )  # fmt: skip
