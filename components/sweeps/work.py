"""The children of a sweep on their way: trained in lockstep, measured each, logged under one MLflow run, kept in one record.

Every child's training and evaluation are under digests of their own, and its training continues from a checkpoint: killed at
any moment, what is called again goes on. A child that fails is marked with the reason, and the others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from components import steps
from components.evaluation.record import EvaluationRecord
from components.progress import progress
from components.records import put_record
from components.run.config import flattened
from components.run.estimate import dense_flops, sparse_flops
from components.run.specification import Specification
from components.settings import UserError, digest
from components.steps.evaluation import own_sae
from components.steps.online import data_for
from components.steps.training import prepared
from components.sweeps.grid import Child
from components.sweeps.groups import Groups, lockstep_groups, usable_memory
from components.sweeps.record import SweepPoint, SweepRecord, read_sweep, record_url
from components.sweeps.sparsity import decoder_cosine
from components.training.job import Outcome, Point, Pruned, TrainingRecord
from components.training.process import TrainingTimeout, launch_together

FAILURES = (FloatingPointError, RuntimeError, MemoryError, UserError, TrainingTimeout)
"""What a child may fail by and its neighbours go on: not a store or a server that is away, which is no child's fault."""
TOGETHER = 12
"""Coders that are measured on one pass of text: more of them save little, and a kill would lose more."""
GiveUp = Callable[[Child, list[Point]], bool]
"""Whether a child that has come to these points of its curves is not worth more."""
Group = Sequence[Child]
Trainer = Callable[[Sequence[Group], GiveUp], Iterator[tuple[Group, "list[Outcome] | Exception"]]]
"""Trains groups in lockstep, and hands each on as it ends: what its children came to, in their order, or how it failed."""

logger = logging.getLogger(__name__)


def never(child: Child, points: list[Point]) -> bool:
    return False


def in_a_process(group: Group, give_up: GiveUp = never) -> list[Outcome]:
    """In a process of its own, which may be killed, or take too long, without an end of the sweep."""
    minutes = group[0].run.config.execution.training_timeout_minutes
    with ExitStack() as starts:
        jobs = [starts.enter_context(prepared(child.run)) for child in group]
        starts.enter_context(data_for([child.run for child in group]))
        seconds = None if minutes is None else minutes * 60
        return launch_together(jobs, group[0].run.device, lambda place, points: give_up(group[place], points), seconds)


def one_after_another(groups: Sequence[Group], give_up: GiveUp) -> Iterator[tuple[Group, list[Outcome] | Exception]]:
    """On this machine."""
    for number, group in enumerate(groups, 1):
        logger.info("sweep: %d in lockstep, group %d of %d", len(group), number, len(groups))
        yield group, attempted(group, give_up)


def attempted(group: Group, give_up: GiveUp = never) -> list[Outcome] | Exception:
    try:
        return in_a_process(group, give_up)
    except FAILURES as error:
        return error


def evaluated(group: Group) -> Iterator[tuple[Child, EvaluationRecord | Exception]]:
    """Trained children of a lockstep group, each with what was measured of it, or why that failed; some at a time on one pass
    of text, and alone where they fail together."""
    for start in range(0, len(group), TOGETHER):
        some = group[start : start + TOGETHER]
        try:
            yield from zip(some, steps.evaluate_together([child.run for child in some]), strict=True)
        except FAILURES as error:
            if len(some) == 1:
                yield some[0], error
            else:
                logger.warning("sweep: %d could not be measured together (%s); each is measured alone", len(some), error)
                for child in some:
                    yield from evaluated([child])


class Work:
    """The points as they come, and what is written of them."""

    def __init__(
        self,
        base: Specification,
        url: str,
        key: str,
        parent: str,
        train: Trainer = one_after_another,
        memory_bytes: int | None = None,
        workers: int = 1,
        study: Mapping[str, Any] | None = None,
    ) -> None:
        """key: the sweep's digest. parent: its MLflow run. train, memory_bytes and workers: see `sweep`."""
        self.base, self.url, self.key, self.parent = base, url, key, parent
        self._trainer, self._memory, self._workers = train, memory_bytes, workers
        self._study = None if study is None else dict(study)
        before = read_sweep(url)
        self._known = {point.sae_digest: point for point in before.points} if before else {}
        self.seconds = before.seconds if before else 0.0
        self.points: dict[str, SweepPoint] = {}

    def know(self, child: Child) -> None:
        """What an earlier call found of it, whatever that is."""
        self.points[child.run.sae_digest] = self._known.get(child.run.sae_digest) or point_of(child, "waiting")

    def add(self, children: Iterable[Child]) -> list[Child]:
        """Those of these that something is left to do of. What an earlier call found counts, unless it was a failure that is of
        the machine and not of the child, or its files are gone."""
        waiting = []
        for child in children:
            known = self.points.get(child.run.sae_digest) or self._known.get(child.run.sae_digest)
            settled = known is not None and (
                known.status in ("diverged", "pruned")
                or (known.status == "finished" and child.run.evaluation_record() is not None)
            )
            self.points[child.run.sae_digest] = known if known is not None and settled else point_of(child, "waiting")
            if not settled:
                waiting.append(child)
        return waiting

    def do(self, children: Sequence[Child], give_up: GiveUp = never) -> None:
        """Train and measure what is waiting of these."""
        waiting = self.add(children)
        untrained = [child for child in waiting if child.run.training_record() is None]
        trained = [child for child in waiting if child not in untrained]
        if trained:
            known = self._grouped(trained)
            for group in (*known.groups, *([child] for child, _ in known.too_large)):
                self.measure(group)
        if not untrained:
            return
        planned = self._grouped(untrained)
        for child, reason in planned.too_large:
            self.fail(child, "failed", UserError(reason))
        self._train(planned.groups, give_up)

    def _grouped(self, children: Group) -> Groups:
        limit = usable_memory(self.base.device) // self._workers if self._memory is None else self._memory
        return lockstep_groups(children, steps.require_dataset(self.base).tokens, limit, self._workers)

    def _train(self, groups: Sequence[Group], give_up: GiveUp) -> None:
        """Train together; a group that fails as a whole is halved until it is known whose fault it was."""
        while groups:
            again: list[Group] = []
            started = time.monotonic()
            for group, outcomes in self._trainer(groups, give_up):
                self.seconds += time.monotonic() - started
                if isinstance(outcomes, Exception):
                    again += self._broken(group, outcomes)
                else:
                    self._settle(group, outcomes)
                started = time.monotonic()
            groups = again

    def _broken(self, group: Group, error: Exception) -> list[Group]:
        """What is to be tried again of a group that failed as a whole."""
        left = [child for child in group if child.run.training_record() is None]
        self.measure([child for child in group if child not in left])  # shorter trainings may have ended before
        if isinstance(error, TrainingTimeout) or len(left) <= 1:
            for child in left:
                self.fail(child, "failed", error)
            return []
        logger.warning("sweep: %d in lockstep failed (%s); each half is tried alone", len(left), error)
        return [half for half in (left[: len(left) // 2], left[len(left) // 2 :]) if half]

    def _settle(self, group: Group, outcomes: Sequence[Outcome]) -> None:
        trained = []
        for child, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, TrainingRecord):
                trained.append(child)
            else:
                self.fail(child, "pruned" if isinstance(outcome, Pruned) else "diverged", outcome)
        self.measure(trained)

    def measure(self, group: Group) -> None:
        """Evaluate trained children of a lockstep group, and log each in an MLflow run under the sweep's."""
        with progress(logger, "evaluate", len(group), "coders") as advance:
            for child, found in evaluated(group):
                if isinstance(found, EvaluationRecord):
                    self._log(child, found)
                else:
                    self.fail(child, "failed", found)
                advance(1, "")

    def _log(self, child: Child, measured: EvaluationRecord) -> None:
        with self._child_run(child) as open_run:
            steps.log_results(child.run, open_run)
            cosine = decoder_cosine(own_sae(child.run.sae_url, child.run.device).W_dec.detach())
            point = point_of(child, "finished", measured, mlflow_run=open_run.run_id, decoder_cosine=cosine)
            open_run.log_evaluation(_compared(point), "sweep")
            self._keep(child, point)

    def fail(self, child: Child, status: str, error: BaseException) -> None:
        logger.warning("sweep: %s: %s", child.title, error)
        run_id = None
        with suppress(type(error)), self._child_run(child) as open_run:
            run_id = open_run.run_id
            if status != "pruned":
                raise error  # which closes it as failed, with the reason
        self._keep(child, point_of(child, status, reason=f"{error}", mlflow_run=run_id))

    def _child_run(self, child: Child) -> Any:
        from components.tracking.runs import PARENT_TAG, tracked_run

        run = child.run
        return tracked_run(
            run.config.tracking,
            run.config.storage.root,
            child.title,
            digest(["child", self.key, run.run_digest]),  # in another sweep it is another run
            flattened(run.config.model_dump(mode="json")),
            {PARENT_TAG: self.parent, "sae.dataset_digest": run.dataset_digest, "sae.digest": run.sae_digest},
            run.code,
        )

    def _keep(self, child: Child, point: SweepPoint) -> None:
        self.points[child.run.sae_digest] = point
        self.put()

    def put(self) -> SweepRecord:
        record = SweepRecord(
            digest=self.key,
            name=self.base.config.name,
            grid=_taken(self.points.values()),
            study=self._study,
            dataset_digest=self.base.dataset_digest,
            evaluation_tokens=self.base.config.evaluation.tokens,
            mlflow_run=self.parent,
            seconds=round(self.seconds, 2),
            points=tuple(self.points.values()),
        )
        put_record(record, record_url(self.url))
        return record


def _taken(points: Iterable[SweepPoint]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for point in points:
        for field, value in point.values.items():
            taken = found.setdefault(field, [])
            if value not in taken:
                taken.append(value)
    return found


def _compared(point: SweepPoint) -> dict[str, Any]:
    """What children are compared by, as numbers of their runs: MLflow's charts have axes for metrics."""
    kept = ("loss", "features", "tokens", "learning_rate", "k", "flops_dense", "flops_sparse", "decoder_cosine")
    return {name: value for name, value in point.model_dump(include=set(kept)).items() if value is not None}


def point_of(
    child: Child,
    status: Any,
    measured: EvaluationRecord | None = None,
    reason: str | None = None,
    **found: Any,
) -> SweepPoint:
    """What stands of a child in the sweep's record; found: fields that neither its run nor `measured` knows."""
    run = child.run
    training, metrics = run.config.training, {} if measured is None else measured.metrics
    variance, l0 = metrics.get("explained_variance"), metrics.get("l0")
    return SweepPoint(
        values=child.values,
        status=status,
        reason=reason,
        sae_digest=run.sae_digest,
        sae_url=run.sae_url,
        architecture=run.config.sae.architecture,
        hook_point=run.hook_point,
        d_in=run.d_in,
        features=run.d_sae,
        k=getattr(run.config.sae, "k", None),
        steps=training.steps,
        batch_size=training.batch_size,
        tokens=training.steps * training.batch_size,
        learning_rate=training.learning_rate,
        flops_dense=dense_flops(run),
        flops_sparse=None if l0 is None else sparse_flops(run, l0),
        loss=None if variance is None else 1 - variance,
        explained_variance=variance,
        l0=l0,
        loss_recovered=metrics.get("loss_recovered"),
        dead_fraction=metrics.get("dead_fraction"),
        **found,
    )
