"""What a run came to, as it is recorded: for its summary, its page, and whoever is to be told."""

from __future__ import annotations

from typing import Any

from components.evaluation.record import Metrics
from components.registry.records import Outcome
from components.run.specification import Specification
from components.settings import Record
from components.steps.interpretation import browser_address
from components.steps.safety import safety_is_there, safety_page


class Summary(Record):
    """What a run prints and returns."""

    name: str
    reused: bool
    """It was there already."""
    digests: dict[str, str]
    paths: dict[str, str]
    metrics: Metrics
    optional: dict[str, Metrics]
    """What the evaluation measured besides, see `EvaluationRecord`."""
    mlflow_uri: str
    outcome: Outcome
    seconds: dict[str, float]
    """Per step."""

    def as_json(self) -> dict[str, Any]:
        """Flat, as `sae run --json` prints it."""
        tree = self.model_dump(mode="json")
        return tree | tree.pop("outcome")


def comparison(run: Specification, outcome: Outcome) -> dict[str, Any]:
    """The registered version of `outcome` beside the champion that it was measured against: `champion` (a version, None
    where there was none), and `metrics` and `gates` as rows of a table."""
    from components.registry import catalogue
    from components.tracking import store

    client = store.connect(run.config.tracking, run.config.storage.root)
    return catalogue.against_champion(client, outcome.registered_model, str(outcome.model_version))


def is_news(run: Specification, outcome: Outcome) -> bool:
    """Whether the registered version of `outcome` is champion and nobody has been told; asked again, it is no news."""
    from components.registry import versions as registry
    from components.tracking import store

    client = store.connect(run.config.tracking, run.config.storage.root)
    return registry.mark_announced(client, outcome.registered_model, str(outcome.model_version))


def run_address(run: Specification, run_id: str) -> str | None:
    """Where the MLflow UI shows a run; None where there is no server."""
    from components.tracking import store

    client = store.connect(run.config.tracking, run.config.storage.root)
    return store.run_address(client, client.get_run(run_id).info.experiment_id, run_id)


def finished_run(run: Specification) -> Outcome | None:
    """The outcome of an earlier run of this very specification that is whole from tokens to registry, or None."""
    record = run.training_record()
    if run.dataset_manifest() is None or record is None or run.evaluation_record() is None:
        return None
    if run.config.interpretation.tokens > 0 and run.interpretation_record() is None:
        return None
    if not safety_is_there(run):
        return None
    from components.registry import versions as registry
    from components.tracking import runs, store

    config = run.config
    if not store.database_exists(config.tracking, config.storage.root):
        return None
    client = store.connect(config.tracking, config.storage.root)
    earlier = runs.find_run(client, config.tracking.experiment, run.run_digest)
    version = registry.find_version(client, run.registered_model, run.run_digest, record.weights_sha256, finished=True)
    if earlier is None or version is None or earlier.info.status != "FINISHED":
        return None
    aliases = ", ".join(registry.aliases_of(client, version)) or None
    return registry.outcome_of(version).model_copy(update={"mlflow_run": earlier.info.run_id, "alias": aliases})


def summary(run: Specification, outcome: Outcome, seconds: dict[str, float], reused: bool) -> Summary:
    from components.redaction import redacted
    from components.tracking.store import tracking_uri

    measured = run.evaluation_record()
    assert measured is not None
    browser = {"browser": browser_address(run)} if run.config.interpretation.tokens > 0 else {}
    if run.config.interpretation.safety:
        browser["safety"] = safety_page(run)
    return Summary(
        name=run.config.name,
        reused=reused,
        digests={"tokens": run.token_digest, "activations": run.dataset_digest, "sae": run.sae_digest},
        paths={"tokens": run.token_url, "activations": run.dataset_url, "sae": run.sae_url, **browser},
        metrics=measured.metrics,
        optional=measured.optional,
        mlflow_uri=redacted(tracking_uri(run.config.tracking, run.config.storage.root)),
        outcome=outcome,
        seconds={name: round(value, 2) for name, value in seconds.items()},
    )
