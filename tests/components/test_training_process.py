"""Training in a process of its own: the same weights, and an end for certain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from processes import training_processes

from components import steps, storage
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.training import process
from components.training.checkpoint import checkpoint_folder
from components.training.parallel.launch import RankFailed
from components.training.process import TrainingTimeout, launch
from components.training.settings import TrainingSettings

CPU = torch.device("cpu")
STOP_SECONDS = TrainingSettings().stop_seconds + process.GRACE_SECONDS


@pytest.fixture
def plan(tiny_tree: dict) -> Specification:
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    return plan


def with_tokens(tree: dict, tokens: int, **more) -> Specification:
    return resolve(parse_config({**tree, "training": {**tree["training"], "tokens": tokens, **more}}))


def work_of(plan: Specification):
    return plan.training()


def test_a_launched_training_gives_the_bytes_and_the_points_of_one_in_this_process(plan: Specification):
    record = steps.train(plan)
    weights = storage.read_bytes(f"{plan.sae_url}/sae_weights.safetensors")
    storage.delete(plan.sae_url)
    seen: list[dict] = []
    launched = launch(work_of(plan), CPU, seen.extend)
    assert storage.read_bytes(f"{plan.sae_url}/sae_weights.safetensors") == weights
    speeds = {"tokens_per_second", "waiting_for_data", "seconds_left"}
    assert launched.curves == record.curves
    assert [{name: value for name, value in point.items() if name not in speeds} for point in seen] == record.curves
    assert all(speeds <= set(point) for point in seen)
    assert seen[-1]["seconds_left"] == 0
    assert all(point["tokens_per_second"] > 0 and 0 <= point["waiting_for_data"] <= 1 for point in seen)


def test_a_training_that_takes_too_long_is_stopped_leaves_a_checkpoint_and_can_be_continued(
    plan: Specification, tiny_tree: dict
):
    slow = with_tokens(tiny_tree, 50_000_000, checkpoint_tokens=1_000_000_000)
    started = time.monotonic()
    with pytest.raises(TrainingTimeout, match=r"more than 0\.75 minutes"):
        launch(work_of(slow), CPU, timeout_seconds=45)
    assert time.monotonic() - started < 45 + STOP_SECONDS
    assert training_processes() == []
    (checkpoint,) = storage.list_names(checkpoint_folder(slow.sae_url))
    assert int(checkpoint.removeprefix("step-").removesuffix(".safetensors")) > 0


def test_an_interrupt_in_the_parent_stops_the_process_and_leaves_a_checkpoint(tiny_tree: dict, plan: Specification):
    slow = with_tokens(tiny_tree, 50_000_000, checkpoint_tokens=1_000_000_000)

    def cancelled(points: list[dict]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(work_of(slow), CPU, cancelled)
    assert training_processes() == []
    assert storage.list_names(checkpoint_folder(slow.sae_url))


def test_the_process_ends_with_a_checkpoint_when_its_parent_is_killed(tiny_tree: dict, plan: Specification, tmp_path: Path):
    slow = with_tokens(tiny_tree, 50_000_000, checkpoint_tokens=1_000_000_000)
    order = tmp_path / "order.json"
    order.write_bytes(process._TRAINING.dump_json(work_of(slow)))
    script = (
        "import sys, torch; from components.training import process as p\n"
        f"work = p._TRAINING.validate_json(open({str(order)!r}).read())\n"
        "p.launch(work, torch.device('cpu'), lambda points: print('point', flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"point\n"
    (child,) = psutil.Process(parent.pid).children()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child.wait(timeout=STOP_SECONDS)
    assert storage.list_names(checkpoint_folder(slow.sae_url))


def test_a_process_that_is_killed_is_said_to_be_and_the_next_one_continues(tiny_tree: dict, plan: Specification):
    longer = with_tokens(tiny_tree, 200_000)

    def kill(points: list[dict]) -> None:
        if points[-1]["tokens"] >= 20_000:
            for child in training_processes():  # none where points arrive that were sent before
                child.kill()

    with pytest.raises(RuntimeError, match="SIGKILL"):
        launch(work_of(longer), CPU, kill)
    assert storage.list_names(checkpoint_folder(longer.sae_url))
    record = launch(work_of(longer), CPU)
    storage.delete(longer.sae_url)
    assert steps.train(longer).weights_sha256 == record.weights_sha256


@pytest.mark.parametrize("several", [False, True])
def test_a_process_that_is_killed_in_the_middle_of_a_message_is_said_to_be(
    tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], several: bool
):
    """A message of many points is longer than what a pipe holds."""
    work, after = work_of(resolve(parse_config(tiny_tree))), ""
    if several:

        def killed(*_: object) -> int:
            raise RankFailed("process 1 of 2 was killed (SIGKILL), by hand or because memory ran out")

        monkeypatch.setattr("components.training.parallel.launch.run_ranks", killed)
        order = {"works": [{"settings": {"stop_seconds": 1}}], "ranks": {"feature_parallel": 2}}
        assert process._run_ranks(order) == 1
        after = capsys.readouterr().out
    end = "sys.exit(1)" if several else "os.kill(os.getpid(), signal.SIGKILL)"
    text = '{"outcomes": [{"curves": [{"loss": 6.05' + after
    (tmp_path / "cut_off.py").write_text(
        f"import os, signal, sys\nsys.stdin.readline()\nprint({text!r}, end='', flush=True)\n{end}\n"
    )
    monkeypatch.setattr(process, "_MODULE", "cut_off")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"was killed \(SIGKILL\)"):
        launch(work, CPU)


def test_a_process_that_somebody_asks_to_stop_leaves_a_checkpoint_and_another_goes_on(tiny_tree: dict, plan: Specification):
    """A node that goes away says so with SIGTERM."""
    longer = with_tokens(tiny_tree, 200_000, checkpoint_tokens=1_000_000)
    asked: list[int] = []

    def terminate(points: list[dict]) -> None:
        if not asked and points[-1]["tokens"] >= 20_000:
            asked.extend(child.pid for child in training_processes() if child.terminate() is None)

    record = launch(work_of(longer), CPU, terminate)
    assert len(asked) == 1
    assert record.tokens_per_second is not None
    storage.delete(longer.sae_url)
    assert steps.train(longer).weights_sha256 == record.weights_sha256


def test_a_mistake_of_the_user_and_a_divergence_come_back_as_what_they_are(tiny_tree: dict, plan: Specification):
    wild = with_tokens(tiny_tree, 20_000, learning_rate=1e15)
    with pytest.raises(FloatingPointError, match=r"training\.learning_rate"):
        launch(work_of(wild), CPU)
    work = work_of(plan)
    other = replace(work, reads=("resid_post.7",))
    with pytest.raises(UserError, match=r"training\.hook_point"):
        launch(other, CPU)
