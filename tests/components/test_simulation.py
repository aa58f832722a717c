"""A run at internet scale, played in short: with the project's own planning, and clocks that are simulated."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from components.planning.place import Place


@pytest.fixture(scope="module")
def simulate() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "simulate.py"
    spec = importlib.util.spec_from_file_location("simulate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate"] = module
    spec.loader.exec_module(module)
    return module


def test_without_losses_and_limits_each_phase_takes_what_it_takes_on_paper(simulate: ModuleType):
    shape = simulate.shape_for(10**9, 65_536, 256, 131_072, 10**8)
    place, world = Place(extraction_workers=8), simulate.World(0.0, 0.0, 1e12, 1e12, 1e12)
    phases = {phase.name: phase for phase in simulate.simulate(shape, place, world, 8)}
    rate = 989e12 * 0.3 / (2 * 8e9 * 17 / 32)
    chunks = -(-(10**9) // (2048 * 256))
    assert phases["scatter"].hours == pytest.approx(-(-chunks // 8) * 256 * 2048 / rate / 3600)
    steps = -(-(10**9) // 16_384)
    assert phases["train"].hours == pytest.approx(steps * 16_384 * 10 * 4096 * 65_536 / (989e12 * 0.3 * 8) / 3600)
    assert all(phase.losses == 0 for phase in phases.values())
    assert world.breaks == []


def test_losses_cost_what_was_under_way_and_too_many_of_them_end_the_run(simulate: ModuleType):
    shape = simulate.shape_for(10**10, 262_144, 256, 1_048_576, 10**8)
    place = Place(extraction_workers=100)
    hours = []
    for rate in (0.0, 0.01, 0.1):
        world = simulate.World(rate, 600, 1e12, 1e12, 1e12)
        phases = simulate.simulate(shape, place, world, 16)
        hours.append(sum(phase.hours for phase in phases))
        assert world.breaks == []
    assert hours == sorted(hours)
    assert hours[-1] > hours[0]
    world = simulate.World(60.0, 600, 1e12, 1e12, 1e12)  # one a minute
    simulate.simulate(shape, place, world, 16)
    assert any("tasks were lost 3 times in each of 6 starts" in text for _, text in world.breaks)


def test_internet_scale_breaks_first_at_the_reads_of_the_shuffle(simulate: ModuleType):
    """What `benchmarks/README.md` says of 10^11 tokens, a thousand workers and 64 ranks."""
    shape = simulate.shape_for(10**11, 1_048_576, 256, 131_072, 500_000)
    world = simulate.World(1e-3, 600, 5_500, 3_500, 12.5e9)
    simulate.simulate(shape, Place(extraction_workers=1_000), world, 64)
    assert world.breaks[0][1].startswith("shuffle:")
    assert any(text.startswith("manifest:") for _, text in world.breaks)


def test_a_coder_that_the_ranks_do_not_hold_is_said(simulate: ModuleType):
    shape = simulate.shape_for(10**9, 34_000_000, 256, 131_072, 10**8)
    world = simulate.World(0.0, 0, 1e12, 1e12, 1e12)
    simulate.simulate(shape, Place(extraction_workers=8), world, 8)
    assert any("8 ranks do not hold the coder" in text for _, text in world.breaks)
