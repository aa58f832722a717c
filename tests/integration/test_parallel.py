"""Parallel trainings as a user starts them: every architecture over 200 steps, and processes that die or are sent away."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import ranks, training_processes
from ranks import LAYOUTS, SAES, extracted, found_by_two, planned, require_equal

from components import steps, storage
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.training.checkpoint import checkpoint_folder
from components.training.job import Training
from components.training.process import launch
from components.training.settings import RankSettings

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")
BY_FEATURES = RankSettings(feature_parallel=2)
IN_PARTS = ("topk", "batchtopk", "jumprelu")


@pytest.fixture(scope="module")
def jobs(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    tree = tiny_tree_in(tmp_path_factory.mktemp("parallel"))
    jobs = extracted({name: planned(tree, sae, steps=200) for name, sae in SAES.items()})
    # As on a GPU, where pre-activations of all features are at hand.
    dense = {f"{name}-dense": replace(jobs[name], url=f"{jobs[name].url}-dense") for name in ("batchtopk", "topk")}
    in_parts = {f"{name}-in-parts": planned(tree, SAES[name], steps=200, parts=4) for name in IN_PARTS}
    return jobs | dense | {name: run.training() for name, run in in_parts.items()}


@pytest.fixture(scope="module")
def found(jobs: dict[str, Training], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by_two(jobs, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*SAES, "batchtopk-dense", "topk-dense", *(f"{name}-in-parts" for name in IN_PARTS)])
def test_two_processes_come_to_the_losses_and_weights_of_one(
    jobs: dict[str, Training], found: dict[str, Any], name: str, layout: str
):
    require_equal(jobs[name], found[f"{name}-{layout}"], layout)


@pytest.mark.parametrize("name", ["batchtopk", "relu"])
def test_four_processes_share_out_features_and_batches(jobs: dict[str, Training], name: str):
    job = replace(jobs[name], url=f"{jobs[name].url}-four")
    record = launch(job, CPU, ranks=RankSettings(data_parallel=2, feature_parallel=2))
    require_equal(jobs[name], record.model_dump(mode="json"), "four")


def by_two(tree: dict) -> Specification:
    run = planned(tree, SAES["batchtopk"], steps=250, execution={"training": BY_FEATURES.model_dump()})
    steps.extract(run)
    return run


@pytest.fixture
def run(tiny_tree: dict) -> Specification:
    return by_two(tiny_tree)


@pytest.fixture(scope="module")
def undisturbed(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checksum of the weights that nobody disturbed, made by the command."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return by_command(by_two(tiny_tree_in(folder)), folder)


def by_command(run: Specification, folder: Path, *launcher: str) -> str:
    config, programs = folder / "config.yaml", Path(sys.executable).parent
    config.write_text(yaml.safe_dump(run.config.model_dump(mode="json", exclude_unset=True)))
    command = [str(programs / "sae"), "train", str(config), "--json"]
    if launcher:
        command = [str(programs / launcher[0]), *launcher[1:], *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["weights_sha256"])


def disturbed(after: int, disturb: Callable[[], Any]) -> Callable[[list[dict]], None]:
    """Disturbs once, when so many tokens have been trained on by two processes."""
    done: list[Any] = []

    def on_points(points: list[dict]) -> None:
        if not done and points[-1]["tokens"] >= after and set(ranks()) == {0, 1}:
            done.append(disturb())

    return on_points


def test_a_process_killed_alone_ends_the_run_which_continues_to_the_same_weights(run: Specification, undisturbed: str):
    with pytest.raises(RuntimeError, match=r"process 1 of 2 was killed \(SIGKILL\)"):
        launch(run.training(), CPU, disturbed(10_000, lambda: ranks()[1].kill()), ranks=BY_FEATURES)
    assert ranks() == {}
    assert storage.list_names(checkpoint_folder(run.sae_url))
    assert steps.launch_training(run).weights_sha256 == undisturbed


def test_a_process_that_is_sent_away_takes_the_others_to_a_checkpoint_and_all_go_on(run: Specification, undisturbed: str):
    record = launch(run.training(), CPU, disturbed(10_000, lambda: ranks()[1].terminate()), ranks=BY_FEATURES)
    assert record.weights_sha256 == undisturbed


def test_torchrun_by_hand_comes_to_the_same_as_the_command(run: Specification, undisturbed: str, tmp_path: Path):
    by_hand = by_command(run, tmp_path, "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python")
    assert by_hand == undisturbed


def test_a_divergence_is_the_same_sentence_and_can_be_run_again(tiny_tree: dict):
    training = {**tiny_tree["training"], "learning_rate": 1e15}
    wild = resolve(parse_config({**tiny_tree, "training": training, "execution": {"training": {"data_parallel": 2}}}))
    steps.extract(wild)
    with pytest.raises(FloatingPointError, match=r"diverged at step .*--replay"):
        steps.launch_training(wild)
    assert steps.replay(wild)["step"] > 0


@pytest.mark.soak
def test_disturbed_25_times_it_ends_with_the_same_weights(run: Specification, undisturbed: str):
    """Killed or sent away, a process alone or the one that started them, at a random moment; some go on by themselves."""
    chance, disturbances, due, record = random.Random(0), 0, 0.0, None

    def disturb(points: list[dict]) -> None:
        nonlocal disturbances, due
        reached, there = points[-1]["tokens"], ranks()
        if disturbances < 25 and reached >= due and set(there) == {0, 1}:
            victim = chance.choice([there[0], there[1], training_processes()[0]])
            victim.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            disturbances, due = disturbances + 1, reached + chance.randrange(1, 2_500)

    while record is None:
        with suppress(RuntimeError):
            record = launch(run.training(), CPU, disturb, ranks=BY_FEATURES)
    assert record.weights_sha256 == undisturbed
    assert disturbances > 10  # some moments come after the last step
