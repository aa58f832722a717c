"""Two runs that start at once where there is no database yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

# Forked after the imports, so that both reach the database within a moment.
PAIRS = """
import os, sys, traceback
from pathlib import Path
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect
import mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
failed = 0
for number in range(int(sys.argv[2])):
    root = Path(sys.argv[1]) / str(number)
    read, write = os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until both are there
            try:
                client = connect(TrackingSettings(), str(root))
                client.create_run(client.get_experiment_by_name("sae-foundry").experiment_id)
                client.search_registered_models()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    os.close(read)
    os.close(write)
    failed += any([os.waitpid(child, 0)[1] for child in children])
sys.exit(f"{failed} of {sys.argv[2]} pairs failed" if failed else 0)
"""


def test_ten_pairs_that_start_at_once_on_fresh_roots_all_find_a_database(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", PAIRS, str(tmp_path), "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
