"""A profile of a training is of its own steps, and leaves the training as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from components import steps, storage
from components.run.config import parse_config
from components.run.specification import resolve
from components.sae.architectures import architectures
from components.sae.coder import Column, Progress
from components.training import throughput
from components.training.throughput import Throughput, peak_flops, said, token_flops

CPU = torch.device("cpu")


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


def test_the_arithmetic_of_a_step_is_what_torch_counts_of_it():
    kind, x = architectures()["relu"], torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    coder = kind(kind.Settings(d_sae=80), (Column("a", 24),), (Column("b", 24),), 80)
    coder.initialise(0)
    with FlopCounterMode(display=False) as counted:
        coder.losses(x, x, Progress(0, 1)).total.backward()
    assert token_flops(coder, x) == pytest.approx(counted.get_total_flops() / 64, rel=0.02)
    kind = architectures()["topk"]
    chosen = kind(kind.Settings(d_sae=80, k=5), (Column("a", 24),), (Column("b", 24),), 80)
    assert token_flops(chosen, x) == 2 * 24 * 80 + 5 * (2 * 24 + 6 * 24)


def test_how_fast_a_training_goes_is_told_since_the_last_time(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    kind, x = architectures()["relu"], torch.zeros(50, 24)
    coder = kind(kind.Settings(d_sae=80), (Column("a", 24),), (Column("a", 24),), 80)
    speed = Throughput(CPU, half=False)
    now[0], speed.tokens, speed.waited = 104.0, 200, 1.0
    assert speed.since(0, 300) == {"tokens_per_second": 50.0, "waiting_for_data": 0.25, "seconds_left": 6.0}
    assert speed.since(0, 300) == {}
    now[0], speed.tokens = 124.0, 1_800
    for _ in range(16):
        speed.took(coder, x)
    found = speed.since(0, 0)
    assert found["mfu"] == pytest.approx(16 * 50 * 10 * 24 * 80 / 20.0 / peak_flops(CPU, False))
    assert (found["tokens_per_second"], found["waiting_for_data"]) == (80.0, 0.0)
    assert said({"loss": 1.0, "l0": 2.0, "dead_fraction": 0.0, **found, "mfu": 0.41}).endswith("waits 0%, mfu 41%")
