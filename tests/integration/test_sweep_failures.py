"""A sweep of which one child diverges, one runs out of memory and one has its process killed; and one on two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from components import steps
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.sweeps import sweep as sweeps
from components.sweeps.grid import child_of, children, parse_grid
from components.sweeps.work import attempted
from components.tracking.store import connect

pytestmark = pytest.mark.integration

ADDRESS_SPACE = 12_000_000
"""KiB: several times what a training of the tiny coder maps, and less than the weights of a huge one."""
HUGE = 400_000_000
KILLED = 3
"""Its k."""


@pytest.fixture
def tree(tiny_tree: dict) -> dict:
    tiny_tree["sae"] = {"architecture": "batchtopk", "d_sae": 64, "k": 4}
    tiny_tree["training"] |= {"tokens": 3_000, "learning_rate": 4e-3}
    tiny_tree["evaluation"] = {"tokens": 500, "baselines": []}
    return tiny_tree


@pytest.fixture
def base(tree: dict) -> Specification:
    return resolve(parse_config(tree))


@pytest.fixture
def little_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every process that a training starts in: the kernel refuses what goes beyond."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -v {ADDRESS_SPACE}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def kill_the_training(ended: threading.Event) -> None:
    """SIGKILL to every training process of this one, as soon as there is one."""
    while not ended.wait(0.05):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "components.training.process" in process.cmdline():
                    process.kill()


def trained(groups, give_up):
    for group in groups:
        ended = threading.Event()
        if any(child.values.get("sae.k") == KILLED for child in group):
            threading.Thread(target=kill_the_training, args=(ended,), daemon=True).start()
        try:
            yield group, attempted(group, give_up)
        finally:
            ended.set()


def test_one_diverges_one_has_no_memory_one_is_killed_and_the_others_complete(
    base: Specification, little_address_space: None, monkeypatch: pytest.MonkeyPatch
):
    settings = [{"training.learning_rate": 1e14}, {"sae.d_sae": HUGE}, {"sae.k": KILLED}, {"sae.k": 5}]
    monkeypatch.setattr(sweeps, "children", lambda base, grid: [child_of(base, values) for values in settings])
    _, record = sweeps.sweep(base, parse_grid(["sae.k=4,5"]), memory_bytes=10**15, train=trained)
    diverged, refused, killed, good = record.points
    assert good.status == "finished"
    assert good.loss is not None
    assert (diverged.status, refused.status, killed.status) == ("diverged", "failed", "failed")
    assert "training diverged at step" in str(diverged.reason)
    assert "memory" in str(refused.reason)
    assert "SIGKILL" not in str(refused.reason)
    assert "the training process was killed (SIGKILL)" in str(killed.reason)
    client = connect(base.config.tracking, base.config.storage.root)
    assert client.get_run(record.mlflow_run).info.status == "FINISHED"
    for bad in (diverged, refused, killed):
        run = client.get_run(bad.mlflow_run)
        assert run.info.status == "FAILED"
        assert run.data.tags["sae.failure"]


@pytest.mark.parametrize("runner", ["threads", "ray", pytest.param("dask", marks=pytest.mark.soak)])
def test_two_workers_come_to_what_one_does(tree: dict, tmp_path: Path, runner: str):
    tree["execution"] = {"workers": 2, "runner": runner}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**tree, "name": "shared"}))
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        str(Path(sys.executable).parent / "sae"),
        "sweep",
        str(config),
        "--grid",
        "sae.k=2,4",
        "--memory-gb",
        "1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert [point["status"] for point in shared["points"]] == ["finished"] * 2, shared["points"]
    del tree["execution"]
    tree["storage"] = {"root": str(tmp_path / "alone")}
    alone = resolve(parse_config({**tree, "name": "shared"}))
    steps.extract(alone)
    for point, child in zip(shared["points"], children(alone, parse_grid(["sae.k=2,4"])), strict=True):
        steps.train(child.run)
        assert point["sae_digest"] == child.run.sae_digest
        assert point["loss"] == pytest.approx(1 - steps.evaluate(child.run).metrics["explained_variance"], rel=1e-5)
    runs = connect(resolve(parse_config(tree)).config.tracking, shared["url"].rsplit("/sweeps/", 1)[0])
    assert {runs.get_run(point["mlflow_run"]).data.tags["mlflow.parentRunId"] for point in shared["points"]} == {
        shared["mlflow_run"]
    }
