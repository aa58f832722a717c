"""CPU, memory, disk, network and GPU use of a run, by MLflow's own monitors and through the run's own buffer.

MLflow's monitor asks the server at every sample and ends for good the first time it does not answer.
"""

from __future__ import annotations

import math
import threading
import time

from mlflow.entities import Metric, Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from components.tracking.buffer import MetricBuffer


class SystemMetrics:
    """Metrics `system/*`; MLflow's step is seconds since the run began."""

    def __init__(self, run: Run, uri: str, buffer: MetricBuffer, interval_seconds: float) -> None:
        """run: as it was found; samples follow those that it has."""
        self._monitor = SystemMetricsMonitor(run.info.run_id, sampling_interval=interval_seconds, tracking_uri=uri)
        self._last = max((metric.step for metric in run.data._metric_objs if metric.key.startswith("system/")), default=-1)
        self._began = run.info.start_time / 1000
        self._buffer, self._interval = buffer, interval_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-system-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end; calling it again does nothing."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _work(self) -> None:
        while True:
            ended = self._stopped.wait(self._interval)
            self._monitor.collect_metrics()
            values = self._monitor.aggregate_metrics()
            for monitor in self._monitor.monitors:
                monitor.clear_metrics()
            now = time.time()
            step = int(now - self._began)
            sample = [Metric(f"system/{name}", float(value), int(now * 1000), step) for name, value in values.items()]
            if step > self._last:  # the last sample may come within a second of the one before
                self._buffer.add([[metric for metric in sample if math.isfinite(metric.value)]])
                self._last = step
            if ended:
                return
