"""The whole line on a real S3 server: SeaweedFS on loopback, with keys from the environment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from components import steps, storage
from components.config import parse_config
from components.planning import Plan

pytestmark = pytest.mark.integration

BIN = Path(sys.executable).parent


@pytest.fixture
def tree(tiny_tree: dict, s3: str, tmp_path: Path) -> dict:
    tiny_tree["storage"]["root"] = f"{s3}/{tmp_path.name}"
    tiny_tree["tracking"]["uri"] = f"sqlite:///{tmp_path}/mlflow.db"
    return tiny_tree


def line(tree: dict) -> tuple[Plan, dict]:
    plan = Plan(parse_config(tree))
    steps.extract(plan)
    steps.train(plan)
    steps.evaluate(plan)
    with steps.tracked(plan, {}) as run:
        return plan, steps.register(plan, run)


def test_the_line_on_s3_gives_the_same_bytes_as_on_a_local_disk(tree: dict, tmp_path: Path):
    remote, outcome = line(tree)
    assert outcome["alias"] == "champion"
    local, _ = line({**tree, "storage": {"root": str(tmp_path / "local")}, "tracking": {"gates": tree["tracking"]["gates"]}})
    assert remote.dataset_manifest() == local.dataset_manifest()
    assert remote.training_record()["weights_sha256"] == local.training_record()["weights_sha256"]
    assert remote.evaluation_record()["metrics"] == local.evaluation_record()["metrics"]
    for shard in remote.dataset_manifest().shards:
        assert storage.read_bytes(f"{remote.dataset_url}/{shard.name}") == storage.read_bytes(
            f"{local.dataset_url}/{shard.name}"
        )
    assert storage.list_names(f"{remote.dataset_url}/scatter") == []
    assert storage.list_names(f"{remote.sae_url}/checkpoints") == []
    assert steps.finished_run(remote) is not None


def test_of_many_writers_on_s3_exactly_one_commits(s3: str, tmp_path: Path):
    url = f"{s3}/{tmp_path.name}/manifest.json"
    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(lambda writer: storage.put_json_once({"writer": writer}, url), range(16)))
    assert sum(won) == 1
    assert storage.read_json(url) == {"writer": won.index(True)}


def test_killed_on_s3_the_extraction_continues_to_the_same_bytes(tree: dict, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    plan = Plan(parse_config(tree))
    moments = {
        "a chunk is there": lambda: storage.list_names(f"{plan.dataset_url}/scatter") != [],
        "a shard is there": lambda: any(name.startswith("shard-") for name in storage.list_names(plan.dataset_url)),
    }
    for moment, reached in moments.items():
        process = subprocess.Popen(
            [str(BIN / "sae"), "extract", str(config)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not reached():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before {moment}"
    manifest = steps.extract(plan)
    undisturbed = Plan(parse_config({**tree, "storage": {"root": str(tmp_path / "local")}}))
    assert steps.extract(undisturbed).shards == manifest.shards
    shutil.rmtree(tmp_path / "local")


def test_wrong_keys_are_one_sentence_without_a_secret(tree: dict, tmp_path: Path):
    """(A bucket that does not exist is no error here: SeaweedFS makes it on the first write.)"""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong-secret-27182"}
    done = subprocess.run([str(BIN / "sae"), "extract", str(config)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert "storage.root" in done.stderr
    assert tree["storage"]["root"] in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret-" not in done.stderr
