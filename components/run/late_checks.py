"""What a later step reads or writes, looked at before the first begins: a mistake costs seconds then, and not a training."""

from __future__ import annotations

from importlib.util import find_spec

from components import storage
from components.corpus.labelled import list_labelled, read_labelled
from components.evaluation.passages import chosen_texts
from components.interpretation.prompt_sets import load_sets, shipped_sets
from components.registry.gates import load_gates
from components.run.config import ExecutionSettings, RunConfig
from components.settings import UserError
from components.tracking.address import tracking_uri
from components.training.parallel.ranks import require_parallel

LONGEST_REGISTERED_NAME = 250
"""Characters; MLflow's databases keep 256 of a registered model's name, and webhooks and aliases add to it."""
LONGEST_WIDTH = 2**31 - 1
"""Features are counted in 32 bits."""


def check_later_steps(config: RunConfig, d_sae: int, registered_model: str, evaluated: bool) -> None:
    """Raise a UserError for what training, evaluation or registration would stop at. evaluated: there will be the last two."""
    if d_sae > LONGEST_WIDTH:
        field = "d_sae" if config.sae.d_sae is not None else "expansion_factor"
        raise UserError(f"sae.{field}: it gives {d_sae} features; accepted are at most {LONGEST_WIDTH}")
    require_runner(config.execution)
    require_parallel(config.execution.training, config.training, config.sae, d_sae)
    require_cache(config)
    if evaluated:
        require_something_to_predict(config)
        load_gates(config.tracking.gates)
        require_registered_name(config, registered_model)
        if storage.is_local(config.storage.root):  # else MLflow may be named later, with `sae register`
            tracking_uri(config.tracking, config.storage.root)
        require_labelled_text(config)
        load_sets([*shipped_sets(), *config.interpretation.prompt_sets], "interpretation.prompt_sets")


def require_labelled_text(config: RunConfig) -> None:
    """That the files of probing tasks have their columns, and labels with enough documents."""
    settings = config.evaluation.probing
    for number, task in enumerate(() if settings is None else settings.tasks):
        if settings is not None and task.source == "files":
            (listed,) = list_labelled([task])
            chosen_texts(read_labelled(task, number, listed), settings, f"evaluation.probing.tasks.{number}")


def require_something_to_predict(config: RunConfig) -> None:
    """That a sequence has a token, not the BOS, after which a next one stands: the evaluation's losses are of those."""
    corpus = config.corpus
    shortest = 3 if corpus.bos == "sequence" else 2
    if corpus.source != "images" and corpus.context_length < shortest:
        raise UserError(
            f"corpus.context_length: {corpus.context_length} leaves no token, after the BOS of each sequence, whose next "
            f"one could be predicted; accepted are at least {shortest} with corpus.bos '{corpus.bos}'"
        )


def require_runner(settings: ExecutionSettings) -> None:
    """That the package of `execution.runner` is installed."""
    package = f"prefect_{settings.runner}"
    if settings.runner != "threads" and find_spec(package) is None:
        raise UserError(
            f"execution.runner: '{settings.runner}' needs the package {package}; install sae-foundry[{settings.runner}]"
        )


def require_cache(config: RunConfig) -> None:
    """That `storage.cache` is a folder of this machine that can be written to."""
    cache = config.storage.cache
    if cache is None:
        return
    if not storage.is_local(cache):
        raise UserError(f"storage.cache: '{cache}' is not on this machine; name a local folder")
    storage.require_writable(cache, "storage.cache")


def require_registered_name(config: RunConfig, name: str) -> None:
    """That MLflow's registry can keep the name."""
    if len(name) > LONGEST_REGISTERED_NAME:
        field = "registered_model" if config.tracking.registered_model else "purpose"
        raise UserError(
            f"tracking.{field}: it makes the registered name '{name[:40]}...' of {len(name)} characters; accepted are at most "
            f"{LONGEST_REGISTERED_NAME}"
        )
