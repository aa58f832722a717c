"""A profile of a training is of its own steps, and leaves the training as it was."""

from __future__ import annotations

import json
from pathlib import Path

from components import steps, storage
from components.run.config import parse_config
from components.run.specification import resolve


def test_a_profile_says_where_the_time_goes_and_keeps_no_step(tiny_tree: dict):
    work = resolve(parse_config(tiny_tree))
    steps.extract(work)
    found = steps.profile(work)
    assert json.loads(json.dumps(found)) == found
    assert 0 <= found["waiting_for_data"] < 1
    assert 0 < found["of_peak"] < 2
    coder, size = work.config.sae, work.config.training.batch_size
    assert found["tokens_per_second"] * found["seconds_per_step"] > size * 0.999
    assert coder.architecture == "relu"
    assert any(name in found["operations"] for name in ("aten::addmm", "aten::mm"))  # a dense step multiplies
    assert sum(float(row.split(", ")[1].rstrip("%")) for row in found["operations"].values()) > 99
    assert json.loads(Path(found["trace"]).read_text())["traceEvents"]
    assert storage.list_names(work.sae_url) == []
    again = steps.train(work)
    assert again.steps == work.config.training.steps
