"""Which of the stored hook points a coder reads, and which it writes."""

from __future__ import annotations

from components.language_model.hook_points import expand_hook_points
from components.language_model.record import ModelRecord
from components.language_model.source import ModelSource
from components.run.config import RunConfig
from components.settings import UserError


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
    return reads, writes
