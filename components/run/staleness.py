"""Whether a configuration's SAE has to be trained again, and why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.registry.records import Outcome
from components.run.config import RunConfig, flattened
from components.run.specification import Specification

NAME_TAG, BASE_TAG, RERUN_TAG = "sae.name", "sae.base_digest", "sae.rerun"
MODEL_TAG, TOKENS_TAG = "sae.language_model_digest", "sae.token_digest"

# They say where and how a run is done and recorded, not what comes out.
_WITHOUT_EFFECT = ("storage.", "execution.", "tracking.", "device", "name", "evaluation.batch_sequences")
_SHOWN_CHANGES = 3
_OURS = "retrain"
"""Stands for the user's word in `RunConfig.rerun` where there is none."""
NOTHING_TO_DO = "nothing to do"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    stale: bool
    reason: str
    """One sentence: what changed, or which version stands."""
    rerun: str | None = None
    """`RunConfig.rerun` of the run that is due."""
    standing: Outcome | None = None
    """Where nothing is stale: the version that stands, as `steps.register` gave it."""


def version_tags(run: Specification) -> dict[str, str]:
    """What a registered version must remember for `verdict` to compare with later."""
    return {
        NAME_TAG: run.config.name,
        BASE_TAG: base_digest(run),
        MODEL_TAG: run.model_digest,
        TOKENS_TAG: run.token_digest,
        **({RERUN_TAG: run.config.rerun} if run.config.rerun else {}),
    }


def base_digest(run: Specification) -> str:
    """Of all that decides a run as its user asked for it, whether it is the first of its kind or a repetition of ours."""
    return run.repeated(_asked_for(run.config.rerun)).run_digest


def _repetition(config: RunConfig, why: str) -> str:
    """`RunConfig.rerun` of a repetition: the user's own word, if there is one, and ours."""
    return f"{_asked_for(config.rerun) or _OURS}+{why}"


def _asked_for(rerun: str | None) -> str | None:
    word = None if rerun is None else rerun.partition("+")[0]
    return None if word == _OURS else word


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
    if force is not None:
        return Verdict(stale=True, reason="forced", rerun=_repetition(config, f"forced-{force}"))
    if not store.database_exists(config.tracking, config.storage.root):
        return Verdict(stale=True, reason="there is no registry yet", rerun=config.rerun)
    client = store.connect(config.tracking, config.storage.root)
    every = registry.finished_versions(client, model)
    base = base_digest(run)
    same = [version for version in every if version.tags.get(BASE_TAG) == base]
    if not same:
        of_name = [version for version in every if version.tags.get(NAME_TAG) == config.name]
        if not of_name:
            return Verdict(stale=True, reason=f"'{config.name}' has no version of {model} yet", rerun=config.rerun)
        last = of_name[-1]
        changes = _changes(registry.lineage_of(client, last).configuration, config)
        return Verdict(stale=True, reason=_what_changed(last.tags, run, changes, last.version), rerun=config.rerun)
    last = same[-1]
    age = (time.time() if now is None else now) - last.creation_timestamp / 1000
    if max_age_days is not None and age > max_age_days * 86400:
        reason = f"version {last.version} of {model} is {age / 86400:.1f} days old, more than {max_age_days:g}"
        return Verdict(stale=True, reason=reason, rerun=_repetition(config, f"after-{last.version}"))
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(last.creation_timestamp / 1000))
    label = f"version {last.version} of {model} of {made} UTC"
    reason = f"{NOTHING_TO_DO}: {label} has the same corpus, language model and configuration"
    return Verdict(stale=False, reason=reason, standing=registry.outcome_of(last))


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
    old, new = flattened(before), flattened(config.model_dump(mode="json"))
    old["rerun"], new["rerun"] = _asked_for(old.get("rerun")), _asked_for(new.get("rerun"))
    names = [name for name in {**old, **new} if not name.startswith(_WITHOUT_EFFECT)]
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
