"""A training's progress on the page of its flow run: the share that is done, tokens per second, time left."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.runtime import flow_run, task_run

from components.training.job import Point

KEY = "training-progress"
INTERVAL_SECONDS = 5.0

Show = Callable[[float, str], None]
"""Takes percent and a line of text."""


@contextmanager
def training_progress(tokens: int) -> Iterator[Callable[[list[Point]], None]]:
    """Yields what takes the training curves' points; `tokens` is the length of the whole training.

    The server is told in a thread, at most every few seconds, and not waited for: it may be away while training goes on.
    """
    with _artifact() as show:
        started = time.monotonic()
        shown = first = -1.0

        def on_points(points: list[Point]) -> None:
            nonlocal shown, first
            done, now = points[-1]["tokens"], time.monotonic() - started
            if first < 0:
                first = done  # what a checkpoint brought was not trained in this time
            if shown >= 0 and now - shown < INTERVAL_SECONDS and done < tokens:
                return
            shown = now
            rate = (done - first) / now if now > 0 else 0.0
            left = f", {max(0.0, tokens - done) / rate:,.0f} s left" if rate > 0 else ""
            values = ", ".join(f"{name} {points[-1][name]:.4g}" for name in ("loss", "l0", "explained_variance"))
            show(100 * min(1.0, done / tokens), f"{done:,.0f} of {tokens:,} tokens, {rate:,.0f} tokens/s{left}; {values}")

        yield on_points


@contextmanager
def _artifact() -> Iterator[Show]:
    """A progress artifact of this task run, kept up to date by a thread with the newest of what it is given."""
    newest: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
    owner = {"flow_run_id": _uuid(flow_run.get_id()), "task_run_id": _uuid(task_run.get_id())}
    thread = threading.Thread(target=_keep, args=(newest, owner), name="progress", daemon=True)
    thread.start()
    try:
        yield lambda percent, text: newest.put((percent, text))
    finally:
        newest.put(None)
        thread.join(timeout=2)


def _keep(newest: queue.SimpleQueue[tuple[float, str] | None], owner: dict[str, Any]) -> None:
    known: UUID | None = None
    with get_client(sync_client=True) as client:
        while (message := newest.get()) is not None:
            last = False
            while not newest.empty():
                following = newest.get()
                last = following is None
                message = following or message
            percent, text = message
            with suppress(Exception):  # the next one will say more
                if known is None:
                    made = ArtifactCreate(key=KEY, type="progress", data=percent, description=text, **owner)
                    known = client.create_artifact(made).id
                else:
                    client.update_artifact(known, ArtifactUpdate(data=percent, description=text))
            if last:
                return


def _uuid(value: Any) -> UUID | None:
    return None if value is None else UUID(str(value))
