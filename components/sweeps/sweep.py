"""A sweep: children trained in lockstep, measured each, and recorded under one MLflow run.

Killed at any moment and called again with the same grid, it goes on: a child's training and evaluation are under digests of
their own, and its training continues from a checkpoint. A child that fails is marked with the reason, and the others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from components import steps, storage
from components.evaluation.record import EvaluationRecord
from components.progress import progress
from components.records import put_record
from components.run.config import flattened
from components.run.estimate import dense_flops, sparse_flops
from components.run.specification import Specification
from components.settings import UserError, digest
from components.steps.evaluation import own_sae
from components.steps.training import prepared
from components.sweeps.grid import Child, Grid, children
from components.sweeps.groups import lockstep_groups, usable_memory
from components.sweeps.record import SweepPoint, SweepRecord, read_sweep, record_url
from components.sweeps.report import log_report
from components.sweeps.sparsity import decoder_cosine
from components.training.job import TrainingRecord
from components.training.process import launch_together

FAILURES = (FloatingPointError, RuntimeError, MemoryError, UserError)
"""What a child may fail by and its neighbours go on: not a store or a server that is away, which is no child's fault."""
Training = Callable[[Sequence[Child]], list[TrainingRecord | FloatingPointError]]
"""Trains children in lockstep; what each came to, in their order."""

logger = logging.getLogger(__name__)


def in_a_process(group: Sequence[Child]) -> list[TrainingRecord | FloatingPointError]:
    """In a process of its own, which may be killed without an end of the sweep."""
    with ExitStack() as starts:
        jobs = [starts.enter_context(prepared(child.run)) for child in group]
        return launch_together(jobs, group[0].run.device)


def sweep_url(base: Specification, grid: Grid) -> str:
    return storage.join(base.config.storage.root, "sweeps", f"{base.config.name}-{sweep_digest(base, grid)}")


def sweep_digest(base: Specification, grid: Grid) -> str:
    return digest(["sweep", {field: list(values) for field, values in grid.items()}, base.run_digest])


def sweep(
    base: Specification, grid: Grid, memory_bytes: int | None = None, train: Training | None = None
) -> tuple[str, SweepRecord]:
    """Where its record is, and the record. memory_bytes: that coders in lockstep may take together; most of what is free
    where it is not given. A UserError for a grid that is no good, before any work."""
    if base.config.execution.training.size > 1:
        raise UserError(
            "execution.training: a sweep trains its coders in lockstep in one process, and not each in several; accepted is 1 "
            "for data_parallel and feature_parallel"
        )
    everyone = children(base, grid)
    url = sweep_url(base, grid)
    manifest = steps.extract(base)
    from components.tracking.runs import tracked_run

    config = base.config
    parameters = {**flattened(config.model_dump(mode="json")), **{f"grid.{field}": list(grid[field]) for field in grid}}
    tags = {"sae.kind": "sweep", "sae.dataset_digest": base.dataset_digest}
    with tracked_run(
        config.tracking, config.storage.root, f"sweep of {config.name}", sweep_digest(base, grid), parameters, tags, base.code
    ) as parent:
        work = _Sweep(base, {field: list(values) for field, values in grid.items()}, url, everyone, parent.run_id)
        waiting = [child for child in everyone if work.points[child.run.sae_digest].status == "waiting"]
        if waiting:
            limit = usable_memory(base.device) if memory_bytes is None else memory_bytes
            untrained = [child for child in waiting if child.run.training_record() is None]
            planned = lockstep_groups(untrained, manifest.tokens, limit)
            for child, reason in planned.too_large:
                work.fail(child, "failed", UserError(reason))
            for child in waiting:
                if child not in untrained:
                    work.measure(child)
            for number, group in enumerate(planned.groups, 1):
                logger.info("sweep: %d in lockstep, group %d of %d", len(group), number, len(planned.groups))
                work.train(group, train or in_a_process)
        record = work.put()
        parent.log_evaluation(_counts(record), "sweep")
        log_report(record, config, parent)
    return url, record


def _counts(record: SweepRecord) -> dict[str, Any]:
    losses = [point.loss for point in record.finished if point.loss is not None]
    return {
        "children": len(record.points),
        "finished": len(record.finished),
        "training_seconds": record.seconds,
        **({"best_loss": min(losses)} if losses else {}),
    }


class _Sweep:
    """The points as they come, and what is written of them."""

    def __init__(
        self, base: Specification, grid: dict[str, list[Any]], url: str, everyone: Sequence[Child], parent: str
    ) -> None:
        self.base, self.grid, self.url, self.parent = base, grid, url, parent
        before = read_sweep(url)
        known = {point.sae_digest: point for point in before.points} if before else {}
        self.seconds = before.seconds if before else 0.0
        self.points = {child.run.sae_digest: self._known(child, known.get(child.run.sae_digest)) for child in everyone}

    def _known(self, child: Child, point: SweepPoint | None) -> SweepPoint:
        """What an earlier call found, unless it is to be done again: a failure that is of the machine and not of the child, or
        one whose files are gone."""
        if point is not None and (
            point.status == "diverged" or (point.status == "finished" and child.run.evaluation_record() is not None)
        ):
            return point
        return _point(child, "waiting")

    def train(self, group: Sequence[Child], train: Training) -> None:
        """Train together; where that fails as a whole, each alone, to learn whose fault it was."""
        started = time.monotonic()
        try:
            outcomes: list[TrainingRecord | FloatingPointError] = train(group)
        except FAILURES as error:
            self.seconds += time.monotonic() - started
            if len(group) == 1:
                self.fail(group[0], "failed", error)
                return
            logger.warning("sweep: %d in lockstep failed (%s); each is trained alone", len(group), error)
            for child in group:
                self.train([child], train)
            return
        self.seconds += time.monotonic() - started
        with progress(logger, "evaluate", len(group), "coders") as advance:
            for child, outcome in zip(group, outcomes, strict=True):
                if isinstance(outcome, FloatingPointError):
                    self.fail(child, "diverged", outcome)
                else:
                    self.measure(child)
                advance(1, "")

    def measure(self, child: Child) -> None:
        """Evaluate a trained child and log it, in an MLflow run under the sweep's."""
        try:
            measured = steps.evaluate(child.run)
        except FAILURES as error:
            self.fail(child, "failed", error)
            return
        with self._child_run(child) as open_run:
            steps.log_results(child.run, open_run)
            cosine = decoder_cosine(own_sae(child.run.sae_url, child.run.device).W_dec.detach())
            open_run.log_evaluation({"decoder_cosine": cosine}, "sweep")
            self._keep(child, _point(child, "finished", measured, mlflow_run=open_run.run_id, decoder_cosine=cosine))

    def fail(self, child: Child, status: str, error: BaseException) -> None:
        logger.warning("sweep: %s: %s", child.title, error)
        run_id = None
        with suppress(type(error)), self._child_run(child) as open_run:
            run_id = open_run.run_id
            raise error  # which closes it as failed, with the reason
        self._keep(child, _point(child, status, reason=f"{error}", mlflow_run=run_id))

    def _child_run(self, child: Child) -> Any:
        from components.tracking.runs import PARENT_TAG, tracked_run

        run = child.run
        return tracked_run(
            run.config.tracking,
            run.config.storage.root,
            child.title,
            digest(["child", sweep_digest(self.base, self.grid), run.run_digest]),  # in another sweep it is another run
            flattened(run.config.model_dump(mode="json")),
            {PARENT_TAG: self.parent, "sae.dataset_digest": run.dataset_digest, "sae.digest": run.sae_digest},
            run.code,
        )

    def _keep(self, child: Child, point: SweepPoint) -> None:
        self.points[child.run.sae_digest] = point
        self.put()

    def put(self) -> SweepRecord:
        record = SweepRecord(
            digest=sweep_digest(self.base, self.grid),
            name=self.base.config.name,
            grid=self.grid,
            dataset_digest=self.base.dataset_digest,
            evaluation_tokens=self.base.config.evaluation.tokens,
            mlflow_run=self.parent,
            seconds=round(self.seconds, 2),
            points=tuple(self.points.values()),
        )
        put_record(record, record_url(self.url))
        return record


def _point(
    child: Child,
    status: Any,
    measured: EvaluationRecord | None = None,
    reason: str | None = None,
    **found: Any,
) -> SweepPoint:
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
