"""Which runs that MLflow shows as RUNNING have a process behind them, and closing the others.

Each run says who writes it: host, process and when that process started, and a heartbeat. On the same host the process
table decides; from another host, a heartbeat that is too old.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from datetime import UTC, datetime

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

from components.storage.staging import host_identity
from components.tracking.settings import FLOW_RUN_TAG

HOST_TAG, PROCESS_TAG, HEARTBEAT_TAG, FAILURE_TAG = "sae.host", "sae.process", "sae.heartbeat", "sae.failure"
BEAT_SECONDS = 30.0
SILENT_SECONDS = 900.0
"""Without a heartbeat for so long, a run of another host counts as dead."""

ABSENT_SECONDS = 180.0
"""Without a heartbeat for so long, nobody waits for a run's end any more."""
LOOK_SECONDS = 5.0

logger = logging.getLogger(__name__)

_open_here: set[str] = set()
"""Runs that this process has open, each in one thread."""
_closed_here = threading.Condition()


def process_identity() -> str:
    """Process number and start: a number alone is given again to others."""
    return f"{os.getpid()}@{psutil.Process().create_time():.2f}"


def ownership_tags() -> dict[str, str]:
    return {HOST_TAG: host_identity(), PROCESS_TAG: process_identity(), HEARTBEAT_TAG: f"{time.time():.0f}"}


def opened(run_id: str) -> None:
    """Returns once no other thread of this process has it open."""
    with _closed_here:
        _closed_here.wait_for(lambda: run_id not in _open_here)
        _open_here.add(run_id)


def closed(run_id: str) -> None:
    with _closed_here:
        _open_here.discard(run_id)
        _closed_here.notify_all()


def beat(client: MlflowClient, run_id: str) -> None:
    client.set_tag(run_id, HEARTBEAT_TAG, f"{time.time():.0f}")


def cause_of_death(run: Run, now: float | None = None) -> str | None:
    """Why nobody writes this RUNNING run any more, None where somebody may."""
    tags = run.data.tags
    host, process = tags.get(HOST_TAG), tags.get(PROCESS_TAG)
    if host is None or process is None:
        return None  # not one of ours
    number = process.partition("@")[0]
    if host == host_identity():
        if process == process_identity():
            return None if run.info.run_id in _open_here else "its process lost the answer when it made the run"
        return None if _is_alive(process) else f"process {number} on {platform.node()} ended without a word"
    silence = (time.time() if now is None else now) - float(tags.get(HEARTBEAT_TAG, "0"))
    if silence <= SILENT_SECONDS:
        return None
    return f"no heartbeat for {silence / 60:.0f} minutes from process {number} on {host.partition('/')[0]}"


def wait_for_its_writer(client: MlflowClient, run: Run, flow_run: str | None) -> Run:
    """Returns the run once nobody else writes it: two that make the same SAE at once would take each other's half-written
    model for a dead one's.

    flow_run: ours, in Prefect. A run that it has written already is its own from before a crash, and not waited for.
    """
    said = False
    run = client.get_run(run.info.run_id)
    while run.info.status == "RUNNING" and run.info.lifecycle_stage == "active" and cause_of_death(run) is None:
        tags = run.data.tags
        if PROCESS_TAG not in tags:
            break  # not one of ours
        silence = time.time() - float(tags.get(HEARTBEAT_TAG, "0"))
        if silence > ABSENT_SECONDS or (flow_run is not None and tags.get(FLOW_RUN_TAG) == flow_run):
            break
        if not said:
            process, host = tags[PROCESS_TAG].partition("@")[0], tags[HOST_TAG].partition("/")[0]
            logger.info("mlflow: process %s on %s makes the same SAE; waiting for its end", process, host)
            said = True
        time.sleep(LOOK_SECONDS)
        run = client.get_run(run.info.run_id)
    return run


def _is_alive(process: str) -> bool:
    number, _, created = process.partition("@")
    try:
        found = psutil.Process(int(number))
        return abs(found.create_time() - float(created)) < 1.0 and found.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False


def close_dead_runs(client: MlflowClient, experiment_id: str) -> list[str]:
    """Set every run of the experiment whose process is dead to FAILED, with the reason; their ids."""
    ended = []
    token = None
    while True:
        page = client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=500, page_token=token)
        for run in page:
            if cause_of_death(run) is None:
                continue
            # Asked again: a run that ended well since the search has no writer either.
            run = client.get_run(run.info.run_id)
            cause = cause_of_death(run) if run.info.status == "RUNNING" else None
            if cause is None:
                continue
            found = f"{cause}; closed by {platform.node()} at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            client.set_tag(run.info.run_id, FAILURE_TAG, found)
            client.set_terminated(run.info.run_id, status="FAILED")
            logger.info("mlflow: run %s is closed as FAILED: %s", run.info.run_id, cause)
            ended.append(run.info.run_id)
        token = page.token
        if not token:
            return ended
