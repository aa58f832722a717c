"""kill -9 to flow processes, again and again, beside runs that nobody touches."""

from __future__ import annotations

import random
import time
from typing import Any

import psutil
from mlflow import MlflowClient
from stack_client import FINAL, Live, named

ENDED = FINAL - {"CRASHED"}
"""A crashed run is started again after half a minute."""
CONFIGURATION = {"training__tokens": 2_000_000, "training__checkpoint_tokens": 50_000, "training__log_tokens": 100_000}


def process_of(run: str) -> psutil.Process | None:
    """The process of a flow run: of those that know its name the first that the worker started."""
    found = []
    for process in psutil.process_iter(["create_time"]):
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run:
                found.append(process)
        except psutil.Error:
            continue
    return min(found, key=lambda process: process.create_time(), default=None)


def killed_beside_siblings(
    live: Live, tree: dict, mlflow: MlflowClient, victims: int, kills: int, name: str = ""
) -> dict[str, Any]:
    """Each of the victims is killed so often, at a random moment of each attempt, while a sibling runs.

    Returns what was seen; fails where a sibling or a worker was disturbed, a run did not end Completed, or weights differ.
    """
    live.ask("/work_pools/gpu", {"concurrency_limit": victims + 1}, method="PATCH")
    live.ask("/v2/concurrency_limits/gpu", {"limit": 100}, method="PATCH")  # a killed run keeps its place for minutes
    try:
        return _killed(live, tree, mlflow, victims, kills, name)
    finally:
        live.ask("/work_pools/gpu", {"concurrency_limit": 2}, method="PATCH")
        live.ask("/v2/concurrency_limits/gpu", {"limit": 1}, method="PATCH")


def _killed(live: Live, tree: dict, mlflow: MlflowClient, victims: int, kills: int, name: str) -> dict[str, Any]:
    chance, began = random.Random(0), time.monotonic()
    workers = {name: state["pid"] for name, state in live.supervisor.states().items() if name.startswith("worker-")}

    def submit(name: str) -> str:
        return live.submit("pipeline/quickstart", {"config": named(tree, name, **CONFIGURATION)})

    runs = {submit(f"victim-{name}{number}"): f"victim-{name}{number}" for number in range(victims)}
    done, due = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0)
    siblings = {submit(f"sibling-{name}0"): f"sibling-{name}0"}
    while True:
        beside = live.flow_run(list(siblings)[-1])
        if beside["state_type"] in ENDED:
            another = f"sibling-{name}{len(siblings)}"
            siblings[submit(another)] = another
            continue
        states = {run: live.flow_run(run) for run in runs}
        if all(found["state_type"] in ENDED for found in states.values()):
            break
        for run, found in states.items():
            if beside["state_type"] != "RUNNING" or found["state_type"] != "RUNNING" or done[run] == kills:
                continue
            if found["run_count"] > done[run] and due[run] == 0:
                due[run] = time.monotonic() + chance.uniform(1, 12)
            elif 0 < due[run] < time.monotonic() and (process := process_of(run)) is not None:
                process.kill()
                done[run], due[run] = done[run] + 1, 0.0
        assert time.monotonic() - began < 3000, {run: found["state"] for run, found in states.items()}
        time.sleep(0.5)

    seen = {run: live.wait(run, 900, lambda found: found["state_type"] in ENDED) for run in [*runs, *siblings]}
    assert {name: state["pid"] for name, state in live.supervisor.states().items() if name in workers} == workers
    assert [found["state_type"] for found in seen.values()] == ["COMPLETED"] * len(seen), [
        found["state"] for found in seen.values()
    ]
    assert {seen[run]["run_count"] for run in siblings} == {1}
    assert {run: seen[run]["run_count"] for run in runs} == dict.fromkeys(runs, kills + 1)
    assert done == dict.fromkeys(runs, kills)
    names = [*runs.values(), *siblings.values()]
    weights = {mlflow.get_model_version_by_alias(name, "champion").tags["sae.weights_sha256"] for name in names}
    assert len(weights) == 1
    return {"kills": sum(done.values()), "siblings": len(siblings), "seconds": round(time.monotonic() - began)}
