"""Metrics on their way to MLflow: kept in memory, sent by a thread of their own, in order, until they have arrived.

`log_batch` of 1,000 values takes 0.3 s over HTTP and much longer while a server restarts; training must not wait for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

Values = list[Metric]
"""The values of one point; they are sent together or not at all."""

MAXIMUM_VALUES = 1000  # of one log_batch call
_FLUSH_SECONDS = 5.0
_LONGEST_PAUSE = 15.0
_PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "INVALID_STATE")

logger = logging.getLogger(__name__)


class MetricBuffer:
    """Bounded; where it overflows, the oldest points are given to `on_drop` and not sent."""

    def __init__(
        self,
        send: Callable[[Values], None],
        is_reachable: Callable[[], bool] = lambda: True,
        on_drop: Callable[[Values], None] = lambda values: None,
        on_beat: Callable[[], None] = lambda: None,
        capacity: int = 5_000,
        beat_seconds: float = 30.0,
    ) -> None:
        """send: raises where the values did not arrive. is_reachable: asked first, so that no call of MLflow's own
        retries hangs for minutes. on_beat: called by the thread now and then while the server answers."""
        self._send, self._is_reachable, self._on_drop, self._on_beat = send, is_reachable, on_drop, on_beat
        self._capacity, self._beat_seconds = capacity, beat_seconds
        self._points: deque[Values] = deque()
        self._changed = threading.Condition()
        self._wanted = False  # somebody waits for an empty buffer
        self._stopping = False
        self._sending = False
        self.failure: Exception | None = None
        """Why values were given up for good: the server refused them."""
        self.sending_seconds = 0.0
        """CPU seconds that the thread has used."""
        self._thread = threading.Thread(target=self._work, name="mlflow-metrics", daemon=True)
        self._thread.start()

    def add(self, points: list[Values]) -> None:
        """Takes them and returns at once."""
        with self._changed:
            self._points.extend(points)
            dropped = [self._points.popleft() for _ in range(len(self._points) - self._capacity)]
            if sum(map(len, points)) >= MAXIMUM_VALUES or len(self._points) * 10 >= MAXIMUM_VALUES:
                self._changed.notify_all()
        for values in dropped:
            self._on_drop(values)

    @property
    def room(self) -> int:
        """Points that can be added before the oldest are dropped."""
        with self._changed:
            return self._capacity - len(self._points)

    def drain(self, seconds: float) -> bool:
        """Wait until everything has been sent; False where that takes longer than so many seconds."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
            while self._points or self._sending:
                left = deadline - time.monotonic()
                if left <= 0 or not self._thread.is_alive():
                    return False
                self._changed.wait(min(left, 1.0))
            self._wanted = False
        return True

    def close(self) -> None:
        """Stop the thread; what has not been sent by then is not sent."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)

    def _work(self) -> None:
        last_beat, pause, away_since = time.monotonic(), 0.0, 0.0
        while True:
            with self._changed:
                if not self._stopping and (pause or not (self._wanted and self._points)):
                    self._changed.wait(pause or _FLUSH_SECONDS)
                if self._stopping:
                    return
                batch = self._next_batch()
            due = time.monotonic() - last_beat >= self._beat_seconds
            if not batch and not due:
                continue
            arrived = self._attempt(batch, due)
            if arrived:
                last_beat = time.monotonic() if due else last_beat
                if pause:
                    logger.info("mlflow: the server answers again after %.0f s", time.monotonic() - away_since)
                pause = 0.0
            else:
                if not pause:
                    away_since = time.monotonic()
                    logger.warning("mlflow: the server does not answer; metrics wait in memory until it does")
                pause = min(_LONGEST_PAUSE, max(0.25, 2 * pause))
            self.sending_seconds = time.thread_time()

    def _next_batch(self) -> list[Values]:
        """The oldest points that fit into one call; they stay in the buffer until they have arrived."""
        batch: list[Values] = []
        size = 0
        for values in self._points:
            if batch and size + len(values) > MAXIMUM_VALUES:
                break
            batch.append(values)
            size += len(values)
        self._sending = bool(batch)
        return batch

    def _attempt(self, batch: list[Values], beat: bool) -> bool:
        arrived = True
        try:
            if not self._is_reachable():
                arrived = False
            else:
                if batch:
                    self._send([value for values in batch for value in values])
                if beat:
                    self._on_beat()
        except MlflowException as error:
            if error.error_code in _PERMANENT:
                self.failure = error
                logger.error("mlflow: values are refused and given up: %s", error.message)
            else:
                arrived = False
        except Exception:  # whatever a connection can die of; the values are kept and tried again
            arrived = False
        with self._changed:
            if arrived:
                # An overflow may have taken some of them away meanwhile.
                sent = {id(values) for values in batch}
                while self._points and id(self._points[0]) in sent:
                    self._points.popleft()
            self._sending = False
            self._changed.notify_all()
        return arrived
