"""MLflow runs: one per pipeline run, continued after a kill, closed with the reason after a failure."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Run
from mlflow.types.schema import ColSpec, DataType, Schema
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from components import storage
from components.activations.manifest import Manifest
from components.settings import UserError
from components.tracking.settings import TrackingSettings

_URI_VARIABLE = "MLFLOW_TRACKING_URI"
RUN_DIGEST_TAG = "sae.run_digest"
_FLUSH_POINTS, _FLUSH_SECONDS = 100, 5.0
_MAXIMUM_METRICS = 1000  # of one log_batch call

logger = logging.getLogger(__name__)


def tracking_uri(settings: TrackingSettings, root: str) -> str:
    """Settings, then environment, then a SQLite file under a local root; a UserError where none is possible."""
    uri = settings.uri or os.environ.get(_URI_VARIABLE)
    if uri:
        return uri
    if not storage.is_local(root):
        raise UserError(f"tracking.uri: not given, and storage.root '{root}' cannot hold a database; name an MLflow server")
    return f"sqlite:///{storage.local_path(root).resolve() / 'mlflow.db'}"


def public_uri(uri: str) -> str:
    """The URI without user and password, fit to be printed."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def connect(settings: TrackingSettings, root: str) -> MlflowClient:
    """Point MLflow at the configured store and make sure that the experiment is there."""
    quiet_mlflow()
    uri = tracking_uri(settings, root)
    environment = os.environ.get(_URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    # MLflow writes the variable too; left there, it would decide the next run of this process with another root.
    if environment is None:
        os.environ.pop(_URI_VARIABLE, None)
    else:
        os.environ[_URI_VARIABLE] = environment
    client = MlflowClient()
    if client.get_experiment_by_name(settings.experiment) is None:
        # A database in a file keeps its artifacts beside it, not in the working directory.
        location = (_file(uri).resolve().parent / "mlflow-artifacts").as_uri() if _is_file(uri) else None
        client.create_experiment(settings.experiment, artifact_location=location)
    mlflow.set_experiment(settings.experiment)
    return client


def database_exists(settings: TrackingSettings, root: str) -> bool:
    """Whether there is a store to ask; a SQLite file that is not there yet would be created by asking."""
    uri = tracking_uri(settings, root)
    return not _is_file(uri) or _file(uri).is_file()


def _is_file(uri: str) -> bool:
    return uri.startswith("sqlite:")


def _file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


def quiet_mlflow() -> None:
    """Settings of the library that must stand before its first use; no telemetry, no copies of this repository."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # With a uv.lock in the working directory, log_model would copy lock and project into the model.
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.utils.environment", "mlflow.system_metrics", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The specified dataset source can be interpreted in multiple ways")


@dataclass
class TrackedRun:
    """An open MLflow run; training points are buffered and none is logged twice."""

    client: MlflowClient
    run_id: str
    _logged: set[int] = field(default_factory=set)
    _buffer: list[list[Metric]] = field(default_factory=list)
    _flushed_at: float = field(default_factory=time.monotonic)

    def add_points(self, points: list[dict[str, float]]) -> None:
        """Training curves under `train/`, with tokens as MLflow's step."""
        now = int(time.time() * 1000)
        for point in points:
            step = int(point["tokens"])
            if step in self._logged:
                continue
            self._logged.add(step)
            values = {name: value for name, value in point.items() if name != "tokens" and math.isfinite(value)}
            self._buffer.append([Metric(f"train/{name}", value, now, step) for name, value in values.items()])
        if len(self._buffer) >= _FLUSH_POINTS or time.monotonic() - self._flushed_at >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        # A point is never cut in two: whether it was logged is asked of its loss alone.
        while self._buffer:
            count = max(1, _MAXIMUM_METRICS // len(self._buffer[0]))
            batch, self._buffer = self._buffer[:count], self._buffer[count:]
            self.client.log_batch(self.run_id, metrics=[metric for point in batch for metric in point])
        self._flushed_at = time.monotonic()

    def log_evaluation(self, metrics: dict[str, Any]) -> None:
        """Metrics under `eval/`; those that are null are left out."""
        mlflow.log_metrics({f"eval/{name}": value for name, value in metrics.items() if value is not None}, run_id=self.run_id)

    def log_dataset(self, manifest: Manifest, url: str) -> None:
        """The activation dataset as the run's input; logging the same one again changes nothing."""
        schema = Schema([ColSpec(_COLUMN_TYPES.get(name, DataType.binary), name) for name in _column_names(manifest)])
        dataset = MetaDataset(
            source=resolve_dataset_source(url), name=url.rstrip("/").rsplit("/", 1)[-1], digest=manifest.digest, schema=schema
        )
        mlflow.log_input(dataset, context="training")

    def log_figures(self, figures: dict[str, Any]) -> None:
        for name, figure in figures.items():
            self.client.log_figure(self.run_id, figure, f"figures/{name}.png")

    def log_artifact_folder(self, folder: Path, name: str) -> None:
        self.client.log_artifacts(self.run_id, str(folder), name)

    def set_tags(self, tags: dict[str, Any]) -> None:
        for key, value in tags.items():
            self.client.set_tag(self.run_id, key, str(value))


_COLUMN_TYPES = {"document": DataType.long, "position": DataType.integer, "token": DataType.integer}


def _column_names(manifest: Manifest) -> list[str]:
    return [line.split(":", 1)[0] for line in manifest.arrow_schema]


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
) -> Iterator[TrackedRun]:
    """The run of that digest: continued where a killed or failed process left it, or a new one.

    It ends as FINISHED, or as FAILED with the reason in the tag `sae.failure`.
    """
    client = connect(settings, root)
    mlflow.set_system_metrics_sampling_interval(settings.system_metrics_seconds)
    mlflow.set_system_metrics_samples_before_logging(1)
    earlier = find_run(client, settings.experiment, run_digest)
    everything = {**tags, **git_tags(), RUN_DIGEST_TAG: run_digest}
    with mlflow.start_run(
        run_id=earlier.info.run_id if earlier else None,
        run_name=name,
        tags=everything,
        log_system_metrics=True,
    ) as active:
        run = TrackedRun(client=client, run_id=active.info.run_id)
        if earlier:
            logger.info("mlflow: continuing run %s", run.run_id)
            run._logged = {metric.step for metric in client.get_metric_history(run.run_id, "train/loss")}
        # What changes no result (a batch size, a log interval) may differ from when the run began; MLflow keeps the first.
        logged = earlier.data.params if earlier else {}
        mlflow.log_params({name: value for name, value in parameters.items() if name not in logged})
        try:
            yield run
        except BaseException as error:
            run.flush()
            client.set_tag(run.run_id, "sae.failure", f"{type(error).__name__}: {error}"[:4000])
            raise
        run.flush()
        if earlier and "sae.failure" in earlier.data.tags:
            client.delete_tag(run.run_id, "sae.failure")


def git_tags() -> dict[str, str]:
    """Commit of the code that runs, and whether it was changed since; empty outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy inside somebody else's checkout must not claim that checkout's commit.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {}
    dirty = "true" if git("status", "--porcelain") else "false"
    return {MLFLOW_GIT_COMMIT: git("rev-parse", "HEAD") or "none", "sae.git_dirty": dirty}
