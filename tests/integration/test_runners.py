"""Extraction, evaluation and feature data on several workers, here and on a Ray or Dask cluster, give what one worker gives."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparing import assert_same
from threadpoolctl import threadpool_limits

from components import steps
from components.activations.dataset.manifest import Manifest
from components.run.config import parse_config
from components.run.specification import resolve

pytestmark = pytest.mark.integration

# Ray and Dask give each worker one thread, and in float32 a matrix product is rounded otherwise by two.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Comparison:
    """The same configuration carried out by one worker in this process, and by the command `sae` on several."""

    def __init__(self, tree: dict, folder: Path, execution: dict) -> None:
        tree["training"]["tokens"] = 3_000
        tree["corpus"] |= {"held_out_tokens": 9_000, "held_out_fraction": 0.5}  # for features, some batches of 4,096
        self.alone = resolve(parse_config({**tree, "storage": {"root": str(folder / "alone")}}))
        self.plan = resolve(parse_config({**tree, "execution": execution}))
        self.config, self.home = folder / "config.yaml", folder / "prefect"
        self.config.write_text(yaml.safe_dump(self.plan.config.model_dump(mode="json", exclude_unset=True)))

    def sae(self, name: str) -> dict[str, Any]:
        command = [str(Path(sys.executable).parent / "sae"), *name.split(), str(self.config), "--json"]
        environment = {**os.environ, **ONE_THREAD, "PREFECT_HOME": str(self.home), "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def extraction(self) -> Manifest:
        """Of several workers, after it was seen to be that of one to the last byte."""
        alone = steps.extract(self.alone)
        assert self.sae("extract")["activations"]["digest"] == alone.digest
        manifest = self.plan.dataset_manifest()
        assert manifest == alone
        for shard in manifest.shards:
            content = Path(self.plan.dataset_url, shard.name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard.sha256
            assert content == Path(self.alone.dataset_url, shard.name).read_bytes()
        return manifest

    def evaluation(self) -> None:
        for plan in (self.alone, self.plan):
            steps.train(plan)
        found = self.sae("evaluate")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        expected = steps.evaluate(self.alone)
        torch.set_num_threads(threads)
        recorded = self.plan.evaluation_record()
        assert recorded is not None
        assert recorded.digest == expected.digest
        for part in ("metrics", "baselines", "breakdown"):
            assert_same(getattr(recorded, part), getattr(expected, part), part)
        assert found["metrics"] == recorded.metrics

    def interpretation(self) -> None:
        """Feature data of several workers, after it was seen to be that of one to the last byte."""
        job = steps.interpretation_job(self.plan)
        assert job is not None
        assert len(job.spans) > 1
        found = self.sae("features make")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with threadpool_limits(1):  # of the map
            expected = steps.interpret(self.alone)
        torch.set_num_threads(threads)
        assert self.plan.interpretation_record() == expected
        assert found["tokens"] == expected.tokens
        for name in ("examples.parquet", "features.parquet"):
            ours, theirs = (Path(run.sae_url, "interpretation", name).read_bytes() for run in (self.plan, self.alone))
            assert ours == theirs, name
        assert Path(found["browser"]).is_file()


@pytest.mark.parametrize("runner", ["threads", "ray", "dask"])
def test_every_runner_gives_the_same_dataset_evaluation_and_feature_data(tiny_tree: dict, tmp_path: Path, runner: str):
    comparison = Comparison(tiny_tree, tmp_path, {"runner": runner, "workers": 2})
    comparison.extraction()
    comparison.evaluation()
    comparison.interpretation()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes with one CPU each."""
    settings = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
    # the dashboard answers where a task ran
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": True})
    try:
        cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


def test_a_ray_cluster_of_two_nodes_gives_what_threads_give(tiny_tree: dict, tmp_path: Path, two_nodes: Any):
    comparison = Comparison(tiny_tree, tmp_path, {"runner": "ray", "workers": 2, "address": two_nodes.address})
    manifest = comparison.extraction()
    assert len(manifest.shards) > 1
    comparison.evaluation()
    from ray.util.state import list_nodes, list_tasks

    dashboard = f"http://{two_nodes.webui_url}"
    nodes = {node.node_id for node in list_nodes(address=dashboard)}
    assert len(nodes) == 2
    places: dict[str, set[str]] = {}
    for task in list_tasks(address=dashboard, detail=True, limit=1_000):
        if task.state == "FINISHED":
            places.setdefault(task.name, set()).add(task.node_id)
    assert places["scatter"] | places["shuffle"] == nodes, places
    assert places["measure"] | places["baselines"] == nodes, places
