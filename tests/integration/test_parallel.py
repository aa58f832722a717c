"""Parallel trainings as a user starts them: every architecture over 200 steps, and processes that die or are sent away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import ranks
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


@pytest.fixture(scope="module")
def jobs(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    tree = tiny_tree_in(tmp_path_factory.mktemp("parallel"))
    jobs = extracted({name: planned(tree, sae, steps=200) for name, sae in SAES.items()})
    # As on a GPU, where pre-activations of all features are at hand.
    dense = {f"{name}-dense": replace(jobs[name], url=f"{jobs[name].url}-dense") for name in ("batchtopk", "topk")}
    return jobs | dense


@pytest.fixture(scope="module")
def found(jobs: dict[str, Training], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by_two(jobs, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*SAES, "batchtopk-dense", "topk-dense"])
def test_two_processes_come_to_the_losses_and_weights_of_one(
    jobs: dict[str, Training], found: dict[str, Any], name: str, layout: str
):
    require_equal(jobs[name], found[f"{name}-{layout}"], layout)


@pytest.mark.parametrize("name", ["batchtopk", "relu"])
def test_four_processes_share_out_features_and_batches(jobs: dict[str, Training], name: str):
    job = replace(jobs[name], url=f"{jobs[name].url}-four")
    record = launch(job, CPU, ranks=RankSettings(data_parallel=2, feature_parallel=2))
    require_equal(jobs[name], record.model_dump(mode="json"), "four")


@pytest.fixture
def run(tiny_tree: dict) -> Specification:
    run = planned(tiny_tree, SAES["batchtopk"], steps=250, execution={"training": BY_FEATURES.model_dump()})
    steps.extract(run)
    return run


def disturbed(run: Specification, disturb: Callable[[], None]) -> Callable[[list[dict]], None]:
    seen: list[int] = []

    def on_points(points: list[dict]) -> None:
        if not seen and points[-1]["tokens"] >= 10_000 and set(ranks()) == {0, 1}:
            seen.append(1)
            disturb()

    return on_points


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_alone_ends_the_run_which_continues_to_the_same_weights(run: Specification, rank: int):
    with pytest.raises(RuntimeError, match=rf"process {rank} of 2 was killed \(SIGKILL\)"):
        launch(run.training(), CPU, disturbed(run, lambda: ranks()[rank].kill()), ranks=BY_FEATURES)
    assert ranks() == {}
    assert storage.list_names(checkpoint_folder(run.sae_url))
    continued = steps.launch_training(run)
    storage.delete(run.sae_url)
    assert steps.launch_training(run).weights_sha256 == continued.weights_sha256


def test_a_process_that_is_sent_away_takes_the_others_to_a_checkpoint_and_all_go_on(run: Specification):
    record = launch(run.training(), CPU, disturbed(run, lambda: ranks()[1].terminate()), ranks=BY_FEATURES)
    storage.delete(run.sae_url)
    assert steps.launch_training(run).weights_sha256 == record.weights_sha256


def test_the_command_and_torchrun_by_hand_come_to_the_same(run: Specification, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run.config.model_dump(mode="json", exclude_unset=True)))
    folder, digests = Path(sys.executable).parent, []
    by_hand = [str(folder / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python"]
    for command in ([], by_hand):
        done = subprocess.run(
            [*command, str(folder / "sae"), "train", str(config), "--json"], capture_output=True, text=True, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr
        digests.append(json.loads(done.stdout)["weights_sha256"])
        storage.delete(run.sae_url)
    assert digests[0] == digests[1]


def test_a_divergence_is_the_same_sentence_and_can_be_run_again(run: Specification, tiny_tree: dict):
    tree = {**tiny_tree, "execution": {"training": {"data_parallel": 2}}}
    tree["training"] = {**tree["training"], "learning_rate": 1e15}
    wild = resolve(parse_config(tree))
    with pytest.raises(FloatingPointError, match=r"diverged at step .*--replay"):
        steps.launch_training(wild)
    assert steps.replay(wild)["step"] > 0
