"""Extraction on several workers, here and on a Ray or Dask cluster, gives the bytes of one worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components import steps
from components.config import parse_config
from components.planning import Plan

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("runner", ["threads", "ray", "dask"])
def test_every_runner_gives_the_same_dataset(tiny_tree: dict, tmp_path: Path, runner: str):
    alone = steps.extract(Plan(parse_config({**tiny_tree, "storage": {"root": str(tmp_path / "alone")}})))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**tiny_tree, "execution": {"runner": runner, "workers": 2}}))
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "sae"), "extract", str(config), "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["activations"]["digest"] == alone.digest
    assert Plan(parse_config(tiny_tree)).dataset_manifest() == alone
