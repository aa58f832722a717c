"""Children of a sweep in lockstep against the same ones, one after the other: `python benchmarks/lockstep.py [FIELD=VALUES]`.

Both sides are what `sae sweep` starts: a process for the group, or one for each child. Seconds of the clock and of the
processor (all threads of the processes, start included) and their ratios, in one run; the weights are compared.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

from components import steps, storage
from components.run.config import load_config
from components.run.specification import resolve
from components.sweeps.grid import Child, children, parse_grid
from components.sweeps.work import in_a_process
from components.training.job import TrainingRecord

GRID = ["sae.d_sae=128,256", "training.tokens=50000", "training.learning_rate=2e-3,4e-3,8e-3"]


def timed(groups: Sequence[Sequence[Child]]) -> tuple[float, float, list[str]]:
    """Seconds of the clock, of the processor, and the weights' checksums."""
    for group in groups:
        for child in group:
            storage.delete(child.run.sae_url)
    clock, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = [record for group in groups for record in in_a_process(group)]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - clock, spent, [one.weights_sha256 for one in found if isinstance(one, TrainingRecord)]


def main() -> None:
    base = resolve(load_config("quickstart", ["rerun=lockstep"]))
    steps.extract(base)
    everyone = children(base, parse_grid(sys.argv[1:] or GRID))
    alone = timed([[child] for child in everyone])
    together = timed([everyone])
    assert together[2] == alone[2], "lockstep gave other weights"
    print("| children | | one after the other | in lockstep | ratio |\n|---|---|---|---|---|")
    for place, name in enumerate(("seconds", "processor seconds")):
        one, other = float(alone[place]), float(together[place])  # type: ignore[arg-type]
        print(f"| {len(everyone)} | {name} | {one:.1f} | {other:.1f} | {one / other:.2f} |")


if __name__ == "__main__":
    main()
