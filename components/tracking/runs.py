"""MLflow runs: one per pipeline run, continued after a kill, closed with the reason after a failure."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.types.schema import ColSpec, DataType, Schema
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME
from mlflow.utils.rest_utils import http_request

from components.activations.dataset.manifest import Manifest
from components.redaction import public, redact_error, redacted, without_secrets
from components.tracking import liveness
from components.tracking.buffer import MAXIMUM_VALUES, MetricBuffer, Values
from components.tracking.code import git_tags
from components.tracking.settings import FLOW_RUN_TAG, TrackingSettings
from components.tracking.store import connect, is_server, refusal_explained, run_address, tracking_uri
from components.tracking.system import SystemMetrics
from components.tracking.termination import Terminated, raised_on_sigterm

RUN_DIGEST_TAG = "sae.run_digest"
PARENT_TAG = MLFLOW_PARENT_RUN_ID
EVALUATION_SET = "held-out"
"""Name of the dataset that evaluations are measured on; its digest is the evaluation set's."""
_CLOSING_SECONDS = 15.0
"""How long a run that failed for another reason waits for its server, to say so there."""
_OPENING = threading.Lock()
"""A thread's run that is made and not yet in `liveness` would look to another thread like one that lost its writer."""

_PER_CALL = 100  # parameters and tags of one log_batch call

logger = logging.getLogger(__name__)


class TrackedRun:
    """An open MLflow run. Metrics are buffered and sent by a thread of their own; none is logged twice."""

    def __init__(self, client: MlflowClient, run: Run, settings: TrackingSettings, uri: str, code: Mapping[str, str]) -> None:
        self.client = client
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.experiment = settings.experiment
        """Its name."""
        self.tags: dict[str, str] = dict(run.data.tags)
        """As they were when the run was opened."""
        self.code = dict(code)
        """The commit that the run is made with, as tags."""
        self._patience = settings.patience_seconds
        self._lock = threading.Lock()
        self._logged: set[int] = set()
        self.buffer = MetricBuffer(
            send=lambda values: client.log_batch(self.run_id, metrics=values),
            is_reachable=lambda: _answers(uri),
            on_drop=self._forget,
            on_beat=lambda: liveness.beat(client, self.run_id),
            beat_seconds=liveness.BEAT_SECONDS,
        )

    @property
    def address(self) -> str | None:
        """Of the run's page, None where there is no server."""
        return run_address(self.client, self.experiment_id, self.run_id)

    def add_points(self, points: Iterable[dict[str, float]]) -> None:
        """Training curves under `train/`, with tokens as MLflow's step. Returns at once; where the server has been away
        for very long, the oldest points are dropped until `complete_points` brings them back."""
        now = int(time.time() * 1000)
        fresh = []
        with self._lock:
            for point in points:
                step = int(point["tokens"])
                if step not in self._logged:
                    self._logged.add(step)
                    fresh.append(_values(point, now, step))
        self.buffer.add(fresh)

    def complete_points(self, points: list[dict[str, float]]) -> None:
        """All points of a finished training: those that have not been logged yet are, and have arrived on return."""
        for start in range(0, len(points), 1000):
            self.flush()
            self.add_points(points[start : start + 1000])
        self.flush()

    def flush(self) -> None:
        """Wait until every buffered metric has arrived."""
        if not self.buffer.drain(self._patience):
            raise TimeoutError(
                f"the MLflow server has not answered for {self._patience:g} s (tracking.patience_seconds); "
                "nothing is lost: run the same again when it does"
            )
        if self.buffer.failure is not None:
            raise self.buffer.failure

    def _forget(self, values: Values) -> None:
        if values and values[0].key.startswith("train/"):
            with self._lock:
                self._logged.discard(values[0].step)

    def log_evaluation(self, metrics: dict[str, Any], group: str = "eval") -> None:
        """Numbers under `eval/` or another group, once; without those that are null or not finite, which MLflow cannot hold."""
        now = int(time.time() * 1000)
        numbers = finite_numbers(metrics)
        known = self.client.get_run(self.run_id).data.metrics
        named = {f"{group}/{name}": value for name, value in numbers.items()}
        self._log_metrics([Metric(name, value, now, 0) for name, value in named.items() if known.get(name) != value])

    def _log_metrics(self, metrics: Values) -> None:
        for start in range(0, len(metrics), MAXIMUM_VALUES):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + MAXIMUM_VALUES])

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        """Those that the run has not got yet; MLflow keeps the first value of a parameter for good."""
        known = self.client.get_run(self.run_id).data.params
        fresh = [Param(name, str(public(value))) for name, value in parameters.items() if name not in known]
        for start in range(0, len(fresh), _PER_CALL):
            self.client.log_batch(self.run_id, params=fresh[start : start + _PER_CALL])

    def log_dataset(self, manifest: Manifest, url: str, digest: str) -> None:
        """The activation dataset as the run's input; logging the same one again changes nothing. digest: of all its
        generations, where it has some."""
        names = manifest.layout.column_bytes
        schema = Schema([ColSpec(_COLUMN_TYPES.get(name, DataType.binary), name) for name in names])
        dataset = MetaDataset(
            source=resolve_dataset_source(url), name=url.rstrip("/").rsplit("/", 1)[-1], digest=digest, schema=schema
        )
        self.client.log_inputs(self.run_id, [_input(dataset, "training")])

    def log_model_output(self, model_id: str) -> None:
        """The logged model as the run's output, which is how MLflow's pages link the two."""
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])

    def log_model_metrics(self, model_id: str, metrics: dict[str, Any], evaluation_set: str, url: str) -> None:
        """The evaluation's numbers as the logged model's own, once, with what they were measured on: the held-out text at
        `url`, which becomes an input of the run.

        A model's metric is also one of the run: it takes the run's own point, time and all, so that the store sees the
        same one again and does not keep a second.
        """
        model = self.client.get_logged_model(model_id)
        present = {metric.key for metric in model.metrics or []}
        points = {metric.key: metric for metric in self.client.get_run(self.run_id).data._metric_objs}
        now, fresh = int(time.time() * 1000), []
        for name, value in finite_numbers(metrics).items():
            key = f"eval/{name}"
            point = points.get(key)
            time_and_step = (point.timestamp, point.step) if point is not None and point.value == value else (now, 0)
            if key not in present:
                fresh.append(Metric(key, value, *time_and_step, model_id, EVALUATION_SET, evaluation_set))
        if fresh:
            source = resolve_dataset_source(url)
            dataset = MetaDataset(source=source, name=EVALUATION_SET, digest=evaluation_set)
            self.client.log_inputs(self.run_id, [_input(dataset, "evaluation")])
        self._log_metrics(fresh)

    def log_figures(self, figures: dict[str, Any]) -> None:
        """As `NAME.png` in the run's uppermost folder: only files there does MLflow's compare page show side by side."""
        for name, figure in figures.items():
            self.client.log_figure(self.run_id, figure, f"{name}.png")

    def log_text(self, text: str, path: str) -> None:
        self.client.log_text(self.run_id, text, path)

    def log_artifact_folder(self, folder: Path, name: str, leave_out: Collection[str] = ()) -> None:
        """The files directly in it, and those of its folders."""
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                self.log_artifact_folder(path, f"{name}/{path.name}")
            elif path.name not in leave_out:
                self.client.log_artifact(self.run_id, str(path), name)

    def set_tags(self, tags: dict[str, Any]) -> None:
        self.client.log_batch(
            self.run_id, tags=[RunTag(key, without_secrets(str(value))[:8000]) for key, value in tags.items()]
        )


def finite_numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The values that MLflow can hold, by name."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _values(point: dict[str, float], now: int, step: int) -> Values:
    # Whether a point was logged is asked of its loss alone: it leads.
    names = sorted((name for name in point if name != "tokens"), key=lambda name: name != "loss")
    return [Metric(f"train/{name}", float(point[name]), now, step) for name in names if math.isfinite(point[name])]


def _input(dataset: MetaDataset, context: str) -> DatasetInput:
    return DatasetInput(dataset._to_mlflow_entity(), [InputTag(MLFLOW_DATASET_CONTEXT, context)])


_COLUMN_TYPES = {"document": DataType.long, "position": DataType.integer, "token": DataType.integer}


def _answers(uri: str) -> bool:
    """Whether the server answers at all, within seconds; MLflow's own calls try for minutes."""
    if not is_server(uri):
        return True
    with suppress(Exception):
        http_request(get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=5, raise_on_status=False)
        return True
    return False


def find_run(client: MlflowClient, experiment: str, run_digest: str) -> Run | None:
    """The newest run of that digest, whatever its state."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    runs = client.search_runs([found.experiment_id], f"tags.`{RUN_DIGEST_TAG}` = '{run_digest}'", max_results=1)
    return runs[0] if runs else None


@contextmanager
def tracked_run(
    settings: TrackingSettings,
    root: str,
    name: str,
    run_digest: str,
    parameters: dict[str, Any],
    tags: dict[str, str],
    code: Mapping[str, str] | None = None,
) -> Iterator[TrackedRun]:
    """The run of that digest: continued where a killed or failed process left it, or a new one.

    It ends as FINISHED, or as FAILED with the reason in the tag `sae.failure`: after an exception, after SIGTERM, and
    after a `kill -9` when the next run of the experiment starts. With the tag `mlflow.parentRunId` it is a child run.
    code: `git_tags` as they were when the run was resolved; those of now where not given.
    """
    client = connect(settings, root)
    uri = tracking_uri(settings, root)
    code = git_tags() if code is None else dict(code)
    with raised_on_sigterm():
        with refusal_explained():
            active, earlier = _open(client, settings, name, run_digest, {**tags, **code})
        run = TrackedRun(client, active, settings, uri, code)
        system = SystemMetrics(active, uri, run.buffer, settings.system_metrics_seconds)
        try:
            if earlier:
                logger.info("mlflow: continuing run %s", run.run_id)
                run._logged |= {metric.step for metric in client.get_metric_history(run.run_id, "train/loss")}
            run.log_parameters(parameters)
            system.start()
            yield run
            system.stop()
            run.flush()
            if earlier and liveness.FAILURE_TAG in earlier.data.tags:
                client.delete_tag(run.run_id, liveness.FAILURE_TAG)
            client.set_terminated(run.run_id, status="FINISHED")
        except BaseException as error:
            redact_error(error)  # before anybody writes it down
            system.stop()
            # In a thread, and not for long: a server that is away must not hide or delay what really happened.
            _within(_CLOSING_SECONDS, partial(_close_as_failed, run, error), redacted(uri))
            raise
        finally:
            run.buffer.close()
            liveness.closed(run.run_id)


def _open(
    client: MlflowClient, settings: TrackingSettings, name: str, run_digest: str, tags: dict[str, str]
) -> tuple[Run, Run | None]:
    """The run, RUNNING, and what was there of it before."""
    experiment = client.get_experiment_by_name(settings.experiment)
    everything = {**tags, **liveness.ownership_tags(), RUN_DIGEST_TAG: run_digest, MLFLOW_SOURCE_NAME: "sae"}
    with _OPENING:
        liveness.close_dead_runs(client, experiment.experiment_id)
        earlier = _first_of(client, experiment.experiment_id, run_digest)
        while earlier is None:
            active = client.create_run(experiment.experiment_id, tags={**everything, MLFLOW_RUN_NAME: name}, run_name=name)
            earlier = _first_of(client, experiment.experiment_id, run_digest)
            if earlier is not None and earlier.info.run_id == active.info.run_id:
                liveness.opened(active.info.run_id)
                return active, None
            client.delete_run(active.info.run_id)  # somebody who began at the same moment was first
    earlier = liveness.wait_for_its_writer(client, earlier, tags.get(FLOW_RUN_TAG))
    if earlier.info.lifecycle_stage == "deleted":  # by such a one
        return _open(client, settings, name, run_digest, tags)
    everything |= liveness.ownership_tags()  # as it is after the wait
    liveness.opened(earlier.info.run_id)
    client.log_batch(earlier.info.run_id, tags=[RunTag(key, str(value)) for key, value in everything.items()])
    client.update_run(earlier.info.run_id, status="RUNNING")
    return client.get_run(earlier.info.run_id), earlier


def _first_of(client: MlflowClient, experiment_id: str, run_digest: str) -> Run | None:
    """The oldest run of that digest: of several that were made at once, the one that stands."""
    found = client.search_runs([experiment_id], f"tags.`{RUN_DIGEST_TAG}` = '{run_digest}'")
    return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _close_as_failed(run: TrackedRun, error: BaseException) -> None:
    run.buffer.drain(_CLOSING_SECONDS / 2)
    run.client.set_tag(run.run_id, liveness.FAILURE_TAG, reason_of(error))
    run.client.set_terminated(run.run_id, status="FAILED")


def reason_of(error: BaseException) -> str:
    """One line for the tag: what ended the run."""
    if isinstance(error, Terminated) or type(error).__name__ == "TerminationSignal":  # the second is Prefect's
        return "SIGTERM: the process was asked to end"
    if isinstance(error, KeyboardInterrupt):
        return "KeyboardInterrupt: stopped from the keyboard"
    return redacted(f"{type(error).__name__}: {error}")[:4000]


def _within(seconds: float, action: Callable[[], None], server: str) -> None:
    """Do it, for at most so many seconds; what goes wrong is a warning."""
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            action()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, name="mlflow-closing", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive() or failures:
        why = f"{type(failures[0]).__name__}" if failures else f"no answer in {seconds:g} s"
        logger.warning("mlflow: %s could not be told of the failure (%s); the next run will close this one", server, why)
