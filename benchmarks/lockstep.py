"""Children of a sweep in lockstep against the same ones, one after the other: `python benchmarks/lockstep.py [FIELD=VALUES]`.

Three ways to the same weights, measurements and MLflow runs: `sae sweep` with one child each; one `sae sweep` that trains and
measures each child alone; and `sae sweep` as it is. Seconds of the clock and of the processor (all threads of all processes,
their start included), in one run; the weights are compared bit for bit, the losses printed as far as they differ.

`--steps [CONFIG...]`: the trainings alone, in this process: eight coders that differ in their learning rates together, and each
alone, in turn, `ROUNDS` times.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from components import steps, storage
from components.run.config import load_config
from components.run.specification import resolve
from components.sweeps.grid import children, parse_grid
from components.sweeps.sweep import sweep
from components.sweeps.work import GiveUp, Group, one_after_another
from components.training.loop import train_together

GRID = ["sae.d_sae=128,1024", "training.tokens=75000,300000", "training.learning_rate=4e-3,8e-3"]
SETTINGS = ["evaluation.tokens=20000", "evaluation.baselines=[]", "evaluation.neighbours=0"]
"""Of the sweeps in benchmarks/README.md."""
_EACH = "--each-alone"
ROUNDS, RATES = 3, "training.learning_rate=1e-3,1.5e-3,2e-3,2.5e-3,3e-3,3.5e-3,4e-3,5e-3"


def each_alone(groups: Sequence[Group], give_up: GiveUp) -> Iterator[tuple[Group, Any]]:
    """A training process and an evaluation for each child."""
    return one_after_another([[child] for group in groups for child in group], give_up)


def trainings(config: str, root: str) -> None:
    settings = [f"storage.root={root}", "training.tokens=200000", "training.checkpoint_tokens=200000"]
    base, ratios = resolve(load_config(config, settings)), []
    steps.extract(base)
    jobs, device = [child.run.training() for child in children(base, parse_grid([RATES]))], torch.device("cpu")
    print("| | eight together, s | each alone, s | ratio |\n|---|---|---|---|")
    for number in range(ROUNDS):
        ways: dict[str, tuple[float, list[str]]] = {}
        for way, groups in (("together", [jobs]), ("alone", [[job] for job in jobs])):
            for job in jobs:
                storage.delete(job.url)
            started = time.monotonic()
            records = [record for group in groups for record in train_together(group, device)]
            ways[way] = time.monotonic() - started, [getattr(record, "weights_sha256", "") for record in records]
        (together, weights), (alone, expected) = ways["together"], ways["alone"]
        assert weights == expected, "lockstep gave other weights"
        ratios.append(together / alone)
        print(f"| {config}, round {number + 1} | {together:.1f} | {alone:.1f} | {ratios[-1]:.2f} |", flush=True)
    print(f"| **{config}**, median | | | {median(ratios):.2f} |\n\nload {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--steps"]:
        with tempfile.TemporaryDirectory(prefix="sae-lockstep-") as root:
            for config in sys.argv[2:] or ("quickstart", "paper"):
                trainings(config, root)
        return
    if sys.argv[1:2] == [_EACH]:
        settings, grid = json.loads(sys.argv[2])
        sweep(resolve(load_config("quickstart", settings)), parse_grid(grid), train=each_alone)
        return
    grid = sys.argv[1:] or GRID
    with tempfile.TemporaryDirectory(prefix="sae-lockstep-") as root:
        shared = [*SETTINGS, f"storage.root={root}"]
        base = resolve(load_config("quickstart", shared))
        everyone = children(base, parse_grid(grid))
        steps.extract(base)
        _sae(shared, [f"{field}={value}" for field, value in everyone[0].values.items()])  # which makes MLflow's tables
        ways = {
            "in lockstep": [_command(shared, 1, grid)],
            "a command for each child": [
                _command(shared, 2, [f"{field}={value}" for field, value in child.values.items()]) for child in everyone
            ],
            "one command, each child alone": [[sys.executable, __file__, _EACH, json.dumps([_in(shared, 3), grid])]],
        }
        found: dict[str, tuple[float, float]] = {}
        weights, losses = [], []
        for way, commands in ways.items():
            for child in everyone:
                storage.delete(child.run.sae_url)
            storage.delete(storage.join(root, "sweeps"))
            found[way] = _timed(commands)
            records = [(child.run.training_record(), child.run.evaluation_record()) for child in everyone]
            weights.append([trained.weights_sha256 for trained, _ in records if trained is not None])
            losses.append([measured.metrics["normalized_mse"] for _, measured in records if measured is not None])
            assert len(losses[-1]) == len(everyone), "a child has not ended"
            assert weights[-1] == weights[0], "lockstep gave other weights"
            print(f"{way}: {found[way]}", file=sys.stderr)
    apart = max(abs(other / one - 1) for one, other in zip(losses[0], losses[-1], strict=True))
    print(f"{len(everyone)} children, the same weights; losses differ by at most {apart:.1e}\n")
    print("| | seconds | ratio | processor seconds | ratio |\n|---|---|---|---|---|")
    clock, processor = found["in lockstep"]
    for way, (one, other) in found.items():
        print(f"| {way} | {one:.1f} | {one / clock:.2f} | {other:.1f} | {other / processor:.2f} |")


def _in(settings: list[str], way: int) -> list[str]:
    """With an experiment of its own, so that no way continues another's MLflow runs."""
    return [*settings, f"tracking.experiment=way-{way}"]


def _command(settings: list[str], way: int, grid: Sequence[str]) -> list[str]:
    sets = [word for setting in _in(settings, way) for word in ("--set", setting)]
    return [
        str(Path(sys.executable).parent / "sae"), "sweep", "quickstart", *sets,
        *(word for field in grid for word in ("--grid", field)), "--json",
    ]  # fmt: skip


def _sae(settings: list[str], grid: Sequence[str]) -> None:
    subprocess.run(_command(settings, 0, grid), check=True, capture_output=True)


def _timed(commands: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    clock, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
