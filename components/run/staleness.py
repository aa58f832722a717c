"""Whether a configuration's SAE has to be trained again, and why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.registry.records import Outcome
from components.run.config import RunConfig, flattened
from components.run.repetition import BASE_TAG, RERUN_TAG, asked_for, repetition
from components.run.specification import Specification
from components.run.start import CHAMPION, START_TAG, registered_version

NAME_TAG, MODEL_TAG, TOKENS_TAG = "sae.name", "sae.language_model_digest", "sae.token_digest"

# They say where and how a run is done and recorded, not what comes out.
_WITHOUT_EFFECT = ("storage.", "execution.", "tracking.", "device", "name", "evaluation.batch_sequences")
# A champion stays a good start where nothing else differs.
_CORPUS_AND_LENGTH = ("corpus.", "training.tokens")
_SHOWN_CHANGES = 3
NOTHING_TO_DO = "nothing to do"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    stale: bool
    reason: str
    """One sentence: what changed, or which version stands."""
    rerun: str | None = None
    """`RunConfig.rerun` of the run that is due."""
    start_from: str | None = None
    """From what the run that is due starts, where its configuration leaves that open: from the champion where nothing but the
    corpus or the length of the training has changed since that one; a repetition from what the version started that it
    repeats. None for new weights."""
    standing: Outcome | None = None
    """Where nothing is stale: the version that stands, as `steps.register` gave it."""


def version_tags(run: Specification) -> dict[str, str]:
    """What a registered version must remember for `verdict` to compare with later."""
    return {
        NAME_TAG: run.config.name,
        BASE_TAG: run.base_digest,
        MODEL_TAG: run.model_digest,
        TOKENS_TAG: run.token_digest,
        **({RERUN_TAG: run.config.rerun} if run.config.rerun else {}),
        **({START_TAG: run.start.location} if run.start else {}),
    }


def verdict(
    run: Specification, force: str | None = None, max_age_days: float | None = None, now: float | None = None
) -> Verdict:
    """Whether the run's SAE is to be trained (again): by the digests of corpus, language model, configuration and versions of
    the recipes, and by its age.

    force: a word that names a run which is wanted in any case. max_age_days: a version that is older is stale.
    now: seconds since 1970, the present where it is not given.
    """
    from components.registry import versions as registry
    from components.tracking import store

    config, model = run.config, run.registered_model
    forced = None if force is None else repetition(config.rerun, f"forced-{force}")
    if not store.database_exists(config.tracking, config.storage.root):
        reason = "there is no registry yet" if forced is None else "forced"
        return Verdict(stale=True, reason=reason, rerun=forced or config.rerun)
    client = store.connect(config.tracking, config.storage.root)
    every = registry.finished_versions(client, model)
    base = run.base_digest
    same = [version for version in every if version.tags.get(BASE_TAG) == base]
    if forced is not None:
        return Verdict(stale=True, reason="forced", rerun=forced, start_from=_start_of(client, run, same))
    if not same:
        of_name = [version for version in every if version.tags.get(NAME_TAG) == config.name]
        if not of_name:
            return Verdict(stale=True, reason=f"'{config.name}' has no version of {model} yet", rerun=config.rerun)
        last = of_name[-1]
        changes = _changes(registry.lineage_of(client, last).configuration, config)
        reason = _what_changed(last.tags, run, changes, last.version)
        warm = config.training.start_from is None and _only_corpus_or_length(client, run)
        return Verdict(stale=True, reason=reason, rerun=config.rerun, start_from=CHAMPION if warm else None)
    last = same[-1]
    age = (time.time() if now is None else now) - last.creation_timestamp / 1000
    if max_age_days is not None and age > max_age_days * 86400:
        reason = f"version {last.version} of {model} is {age / 86400:.1f} days old, more than {max_age_days:g}"
        again = repetition(config.rerun, f"after-{last.version}")
        return Verdict(stale=True, reason=reason, rerun=again, start_from=_start_of(client, run, same))
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(last.creation_timestamp / 1000))
    label = f"version {last.version} of {model} of {made} UTC"
    reason = f"{NOTHING_TO_DO}: {label} has the same corpus, language model and configuration"
    return Verdict(stale=False, reason=reason, standing=registry.outcome_of(last))


def due_run(run: Specification, due: Verdict) -> Specification:
    """The run that is due, with the coder that it starts from."""
    again = run.repeated(due.rerun)
    return again if due.start_from is None else again.starting_from(due.start_from, must_fit=False)


def _start_of(client: Any, run: Specification, same: list[Any]) -> str | None:
    """From what a repetition starts: as the newest of the versions that it repeats; None where that is not there any more."""
    location = same[-1].tags.get(START_TAG) if same and run.config.training.start_from is None else None
    return location if location is not None and registered_version(client, location) is not None else None


def _only_corpus_or_length(client: Any, run: Specification) -> bool:
    """Of what differs between the champion and this run."""
    from components.registry import versions as registry

    champion = registry.champion_of(client, run.registered_model)
    if champion is None or champion.tags.get(MODEL_TAG) != run.model_digest:
        return False
    before = registry.lineage_of(client, champion).configuration
    names = changed_fields(before, run.config)
    return all(name.startswith(_CORPUS_AND_LENGTH) for name in names) and (
        bool(names) or champion.tags.get(TOKENS_TAG) != run.token_digest
    )


def _what_changed(tags: Mapping[str, str], run: Specification, changes: list[str], version: Any) -> str:
    since = f"since version {version} of {run.registered_model}"
    if changes:
        more = f" and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
        return f"the configuration changed {since}: {', '.join(changes[:_SHOWN_CHANGES])}{more}"
    if tags.get(MODEL_TAG) != run.model_digest:
        return f"the language model changed {since}"
    if tags.get(TOKENS_TAG) != run.token_digest:
        return f"the corpus changed {since}"
    return f"the recipe or the metrics have another version {since}"


def _changes(before: dict[str, Any], config: RunConfig) -> list[str]:
    """`field old -> new` for every field that has another value and an effect."""
    return [f"{name} {old} -> {new}" for name, (old, new) in changed_fields(before, config).items()]


def changed_fields(before: dict[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Old and new value of every field that has another one and an effect."""
    old, new = flattened(before), flattened(config.model_dump(mode="json"))
    old["rerun"], new["rerun"] = asked_for(old.get("rerun")), asked_for(new.get("rerun"))
    names = [name for name in {**old, **new} if not name.startswith(_WITHOUT_EFFECT)]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}
