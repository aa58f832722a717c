"""SAEBench's own classes read our `core` result, and read the same values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components import steps
from components.run.config import parse_config
from components.run.specification import resolve

pytestmark = pytest.mark.integration

READ = """
import json, sys
from dataclasses import asdict
from pydantic import TypeAdapter
from sae_bench.evals.core.eval_output import CoreEvalOutput
print(json.dumps(asdict(TypeAdapter(CoreEvalOutput).validate_json(open(sys.argv[1]).read(), strict=True))))
"""


def test_saebench_reads_what_is_written_for_it(tiny_tree: dict, saelens: Path):
    tiny_tree["evaluation"] = {"tokens": 300, "reference_tokens": 500, "baselines": []}
    run = resolve(parse_config(tiny_tree))
    steps.extract(run)
    steps.train(run)
    path = steps.write_saebench(run, run.sae_url, steps.evaluate(run))
    environment = {**os.environ, "PYTHONPATH": str(saelens)}
    done = subprocess.run([sys.executable, "-c", READ, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(Path(path).read_text())
