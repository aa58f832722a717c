"""The coder of a run: which of the stored hook points it reads, which it writes, and its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.language_model.architectures import SECOND
from components.language_model.hook_points import expand_hook_points
from components.language_model.record import ModelRecord
from components.language_model.source import ModelSource
from components.run.config import RunConfig
from components.settings import UserError
from components.storage.cache import CachePlace
from components.training.job import Training


def coder_columns(config: RunConfig, model: ModelRecord, source: ModelSource) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the coder reads and writes; a UserError where that is no column."""

    def column(name: str, field: str) -> str:
        found = str(expand_hook_points([name], source, field)[0])
        model.require_stored(found, field)
        return found

    training = config.training
    several = tuple(column(name, "training.crosscoder") for name in training.crosscoder)
    if several:
        if training.hook_point or training.target:
            raise UserError("training.crosscoder: it is given beside training.hook_point or training.target; give one")
        if len(set(several)) != len(several) or len(several) == 1:
            raise UserError(f"training.crosscoder: {list(several)} is not accepted: two or more different hook points")
        reads = writes = several
    else:
        wanted = training.hook_point
        reads = (model.columns[0].name if wanted is None else column(wanted, "training.hook_point"),)
        writes = reads if training.target is None else (column(training.target, "training.target"),)
    if config.sae.skip and reads == writes:
        raise UserError("sae.skip: true is accepted for a transcoder, which training.target makes of it")
    if config.sae.subtract_decoder_bias and reads != writes:
        raise UserError("sae.subtract_decoder_bias: true is accepted for a coder that writes what it reads, and no transcoder")
    return reads, writes


def of_two_models(reads: Sequence[str], writes: Sequence[str]) -> bool:
    """Whether it is a crosscoder of one hook point in two models, by which these are compared."""
    return tuple(reads) == tuple(writes) and len(reads) == 2 and reads[1] == f"{SECOND}.{reads[0]}"


def hook_points_said(reads: Sequence[str], writes: Sequence[str]) -> str:
    """Where a coder is, for people and in names."""
    return "+".join(reads) + ("" if reads == writes else f"-to-{writes[0]}")


def placement(reads: Sequence[str], writes: Sequence[str]) -> dict[str, str]:
    """The same as SAELens says it."""
    return {"hook_name": reads[0], **({} if reads == writes else {"hook_name_out": writes[0]})}


def registered_name(config: RunConfig, slug: str, place: str) -> str:
    """Of the model in the registry."""
    tracking = config.tracking
    name = tracking.registered_model or f"{slug}.{place}"
    name = f"{name}.{tracking.purpose}" if tracking.purpose else name
    return name.replace("/", "-").replace(":", "-")


def coder_training(
    config: RunConfig, model: ModelRecord, reads: tuple[str, ...], writes: tuple[str, ...], **named: Any
) -> Training:
    """What there is to do. named: the fields of `Training` that are addresses and identities."""
    second = config.language_model.second
    corpus, storage, of_images = config.corpus, config.storage, config.corpus.source == "images"
    return Training(
        settings=config.training,
        coder=config.sae,
        reads=reads,
        writes=writes,
        online=config.activations.mode == "online",
        seed=config.seed,
        metadata={
            "model_name": config.language_model.name,
            **({} if second is None else {"second_model_name": second.name}),
            **placement(reads, writes),
            "context_size": len(model.layout()) if of_images else corpus.context_length,
            "prepend_bos": corpus.bos != "none",
            "dataset_path": corpus.title,
        },
        cache=None if storage.cache is None else CachePlace(folder=storage.cache, limit=storage.cache_bytes),
        **named,
    )
