"""A study: Optuna draws the children, some at a time, from what the ones before came to.

Optuna's database holds what was drawn and how it ended. Killed and called again, a study first takes up what was drawn and has
no end yet: a child that was trained or measured is found under its digest, and one that was under way continues from its
checkpoint, so that nothing is drawn or done twice. One process leads a study at a time; its children may be on many workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from components import steps, storage
from components.run.specification import Specification
from components.settings import UserError, digest
from components.sweeps.grid import Child, child_of
from components.sweeps.record import SweepPoint, SweepRecord
from components.sweeps.space import OBJECTIVES, Range, StudySettings
from components.sweeps.sweep import close, parent_run, require_one_process, require_one_reader
from components.sweeps.work import GiveUp, Trainer, Work, never, one_after_another
from components.training.job import Point

if TYPE_CHECKING:
    import optuna

_STARTUP = 5
"""Trials that end before any is pruned."""
_CHECKED = 20
"""Combinations that are looked at before work starts."""


def study_digest(base: Specification, settings: StudySettings) -> str:
    """Of all that decides what is drawn next; how many there are to be is left out, so that a study can be extended."""
    kept = settings.model_dump(mode="json", exclude={"trials", "together", "storage"})
    return digest(["study", kept, base.run_digest])


def study_url(base: Specification, settings: StudySettings) -> str:
    return storage.join(base.config.storage.root, "sweeps", f"{base.config.name}-{study_digest(base, settings)}")


def check_study(base: Specification, settings: StudySettings) -> None:
    """A UserError for a field or a value that is no good, or a database that there is none of, before any work."""
    require_one_process(base)
    ends = {name: found if isinstance(found, tuple) else (found.low, found.high) for name, found in settings.space.items()}
    for place in range(min(_CHECKED, max(map(len, ends.values())))):
        child_of(base, {name: _plain(values[min(place, len(values) - 1)]) for name, values in ends.items()})
    if settings.storage is None and not storage.is_local(base.config.storage.root):
        raise UserError(
            f"study.storage: SQLite needs a disk, and storage.root is '{base.config.storage.root}'; give a PostgreSQL "
            "database, such as postgresql+psycopg2://user@host/optuna (also SAE_STUDY_STORAGE)"
        )


def study(
    base: Specification,
    settings: StudySettings,
    memory_bytes: int | None = None,
    train: Trainer = one_after_another,
    workers: int = 1,
) -> tuple[str, SweepRecord]:
    """Where its record is, and the record; the rest as of `sweep`."""
    check_study(base, settings)
    require_one_reader(base, workers)
    url, key = study_url(base, settings), study_digest(base, settings)
    steps.extract(base)
    varied = {f"space.{field}": found for field, found in settings.model_dump(mode="json")["space"].items()}
    with storage.claimed(url), parent_run(base, key, varied) as parent:
        shown = settings.model_dump(mode="json", exclude={"storage"})
        work = Work(base, url, key, parent.run_id, train, memory_bytes, workers, study=shown)
        _optimize(_open(settings, url, key, base.config.training.tokens), base, settings, work)
        record = work.put()
        close(record, url, base, parent)
    return url, record


def _open(settings: StudySettings, url: str, key: str, tokens: int) -> optuna.Study:
    """tokens: of each training."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners = {
        "none": optuna.pruners.NopPruner(),
        "median": optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=tokens // 5),
        "halving": optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, tokens // 16)),
    }
    place = settings.storage or f"sqlite:///{storage.local_path(storage.join(url, 'study.db'))}"
    if settings.storage is None:
        storage.local_path(url).mkdir(parents=True, exist_ok=True)
    try:
        found = optuna.create_study(
            storage=place, study_name=key, pruner=pruners[settings.pruner], direction=OBJECTIVES[settings.objective],
            load_if_exists=True,
        )  # fmt: skip
    except (ImportError, ValueError, optuna.exceptions.StorageInternalError) as error:
        raise UserError(f"study.storage: '{place}' cannot be opened ({' '.join(str(error).split())[:200]})") from error
    # A call that goes on must not draw what the first one began with.
    seed = (int(key[:8], 16) + len(found.get_trials(deepcopy=False))) % 2**32
    # Those that are under way count as bad ones: what is drawn together is spread out.
    tpe = settings.sampler == "tpe"
    found.sampler = optuna.samplers.TPESampler(seed=seed) if tpe else optuna.samplers.RandomSampler(seed=seed)
    return found


def _optimize(found: optuna.Study, base: Specification, settings: StudySettings, work: Work) -> None:
    import optuna

    for settled in found.get_trials(deepcopy=False):  # by earlier calls, failures too
        if settled.state.is_finished():
            work.know(_child(base, settings, settled.params))
    while True:
        everything = found.get_trials(deepcopy=False)
        # Drawn by a call that was killed; nobody else leads this study now.
        trials = [optuna.trial.Trial(found, trial._trial_id) for trial in everything if not trial.state.is_finished()]
        left = settings.trials - len(everything)
        if not trials:
            trials = [found.ask(_distributions(settings)) for _ in range(min(settings.together, left))]
        if not trials:
            return
        drawn = [(trial, _child(base, settings, trial.params)) for trial in trials]
        by_digest = {child.run.sae_digest: trial for trial, child in drawn}
        unique = list({child.run.sae_digest: child for _, child in drawn}.values())
        work.do(unique, never if settings.pruner == "none" else _pruning(by_digest))
        for trial, child in drawn:
            _tell(found, trial, work.points[child.run.sae_digest], settings.objective)


def _pruning(trials: dict[str, optuna.Trial]) -> GiveUp:
    reported: set[tuple[str, int]] = set()

    def give_up(child: Child, points: list[Point]) -> bool:
        trial = trials[child.run.sae_digest]
        for point in points:
            place = (child.run.sae_digest, int(point["tokens"]))
            if "explained_variance" in point and place not in reported:
                reported.add(place)
                trial.report(1 - point["explained_variance"], place[1])
        return trial.should_prune()

    return give_up


def _tell(found: optuna.Study, trial: optuna.Trial, point: SweepPoint, objective: str) -> None:
    from optuna.trial import TrialState

    value = getattr(point, objective)
    trial.set_user_attr("sae", point.sae_digest)
    if point.reason is not None:
        trial.set_user_attr("reason", point.reason)
    if value is not None:
        found.tell(trial, value)
    else:  # one that diverged counts as the worst there is; one that failed for its machine's sake says nothing
        found.tell(trial, state=TrialState.FAIL if point.status == "failed" else TrialState.PRUNED)


def _child(base: Specification, settings: StudySettings, drawn: dict[str, Any]) -> Child:
    values = {}
    for field, found in settings.space.items():
        values[field] = drawn[field] if isinstance(found, Range) else _plain(found[drawn[field]])
    return child_of(base, values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _distributions(settings: StudySettings) -> dict[str, Any]:
    """Values are drawn by their place in the list: Optuna keeps no lists."""
    return {field: _distribution(found) for field, found in settings.space.items()}


def _distribution(found: Range | Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(found, Range):
        return CategoricalDistribution(tuple(range(len(found))))
    if isinstance(found.low, int) and isinstance(found.high, int):
        return IntDistribution(found.low, found.high, log=found.log)
    return FloatDistribution(found.low, found.high, log=found.log)
