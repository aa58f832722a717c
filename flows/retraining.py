"""Retraining as Prefect flows: `retrain` for one configuration, `nightly` for several; only what is stale is trained."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger, tags
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from components.bounds import Days
from components.run import staleness
from components.run.config import RunConfig, load_config
from components.settings import UserError
from flows import artifacts
from flows.pipeline import line
from flows.runs import begin, begin_with

NOTHING_TO_DO, PROMOTED, REFUSED, RETRAINED = "NothingToDo", "Promoted", "Refused", "Retrained"
"""Names of the states in which these flows complete."""


@flow(name="retrain", flow_run_name="{config.title}")
def retrain(config: RunConfig, force: bool = False, max_age_days: Days | None = None, commit: str | None = None) -> State[Any]:
    """Train again if corpus, language model, configuration, recipe or age say so, or by `force`; activations are reused.

    max_age_days: an SAE that is older is trained anew. commit: of the change that asks for it, a tag of the runs.
    Completes as `NothingToDo`, `Promoted` or `Refused`, with the reason.
    """
    run = begin_with(config, champion_must_fit=False)
    # The same after a crash, when the run is started again and goes on with its SAE.
    word = str(flow_run.get_root_flow_run_id()).split("-")[0] if force else None
    due = staleness.verdict(run, word, max_age_days)
    get_run_logger().info("%s: %s", config.name, due.reason)
    if due.standing is not None:
        if due.standing.alias == "champion":
            return Completed(name=NOTHING_TO_DO, message=due.reason)
        # Asked again, a refusal is still one.
        artifacts.verdict(run, due.standing)
        return Completed(name=REFUSED, message=f"{due.reason}, and it stands refused: {due.standing.alias_reason}")
    run = staleness.due_run(run, due)
    get_run_logger().info("%s: training starts %s", config.name, run.start_said)
    with tags(*([f"commit:{commit[:12]}"] if commit else [])):
        outcome = line(run).outcome
    version = f"{outcome.registered_model} version {outcome.model_version}"
    return Completed(
        name=PROMOTED if outcome.alias == "champion" else REFUSED,
        message=f"{version}: {outcome.alias_reason} (trained because {due.reason})",
    )


@flow(name="nightly")
def nightly(configs: list[str], max_age_days: Days | None = None, force: bool = False) -> State[None]:
    """`retrain` for each of the configurations: YAML files where the worker is, `s3://` addresses, or names that ship.

    One that fails does not keep the others; at the end the run fails if any did.
    """
    begin()
    states = {source: _retrained(source, force, max_age_days) for source in configs}
    lines = "; ".join(f"{source}: {state.message or state.name}" for source, state in states.items())
    if not all(state.is_completed() for state in states.values()):
        return Failed(message=lines)
    idle = all((state.message or "").startswith(staleness.NOTHING_TO_DO) for state in states.values())
    return Completed(name=NOTHING_TO_DO if idle else RETRAINED, message=lines)


def _retrained(source: str, force: bool, max_age_days: float | None) -> State[Any]:
    try:
        config = load_config(source)
    except UserError as error:
        return Failed(message=str(error))
    return retrain(config, force=force, max_age_days=max_age_days, return_state=True)
