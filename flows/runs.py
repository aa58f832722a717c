"""What every flow of ours does with the flow run that it is."""

from __future__ import annotations

import logging

from prefect.runtime import deployment, flow_run

from components.run.checks import check
from components.run.config import RunConfig
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.tracking.settings import FLOW_RUN_TAG

STARTS = 6
"""How often a flow run may be started: the automation `crashed-runs-continue` starts one again each time its machine died."""


def lineage_tags() -> dict[str, str]:
    """MLflow tags that lead from a run to this flow run."""
    return {FLOW_RUN_TAG: str(flow_run.get_id()), "prefect.flow_run_name": str(flow_run.get_name())}


def begin() -> None:
    """To be called first in every flow: a UserError where this flow run has been started so often that it is likely to be what
    kills its machine."""
    # Prefect sends the logs of PREFECT_LOGGING_EXTRA_LOGGERS to its server, at the level that they have.
    logging.getLogger("components").setLevel(logging.INFO)
    count = flow_run.get_run_count()
    if count is not None and count > STARTS:
        raise UserError(
            f"this flow run has been started {count} times and never came to an end; memory is the usual reason "
            "(`sae plan` says how much a run takes). Start a new one once it is mended: it continues where this one stopped"
        )


def begin_with(config: RunConfig, only_data: bool = False, champion_must_fit: bool = True) -> Specification:
    """`begin`, and the configuration resolved and checked, see `components.run.checks.check`."""
    begin()
    run = resolve(config, champion_must_fit=champion_must_fit)
    check(run, only_data=only_data, attended=deployment.get_id() is None)
    return run
