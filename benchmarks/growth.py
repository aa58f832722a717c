"""Every stage of the line on a corpus and on ten times as much of it: `python benchmarks/growth.py --folder FOLDER`.

Tokens, extraction with its shuffle, training of two epochs and evaluation of the quickstart, each in a process of its own that
has done it once for a few tokens before its clock starts, so that imports and first touches are in no figure. The small corpus
is taken before and after the large one in each round. Of training the time between its first point of the curves and its last
counts, and in place of the quickstart's dead features after 200,000 tokens a tenth of the training, so that both do the same.
Prints one JSON object: medians of seconds of the clock and of the processor for a million tokens, the kernel's peak of the
process (VmHWM) in MB, and what each is at ten times the tokens over what it is at one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from components import steps
from components.run.config import load_config
from components.run.specification import Specification, resolve

FEW = 16_384
EVALUATED = 5
"""Tokens of the corpus for each that is evaluated."""
Clock = tuple[float, float, float]
"""Tokens, and seconds of the clock and of the processor."""


def configured(root: Path, tokens: int) -> Specification:
    held_out = max(tokens // EVALUATED, 4_096)
    fields = [
        f"storage.root={root}", "device=cpu", f"corpus.train_tokens={tokens}", f"corpus.held_out_tokens={held_out}",
        f"training.tokens={2 * tokens}", "training.dead_after_share=0.1", "training.log_tokens=10_240",
        f"evaluation.tokens={held_out}", "evaluation.baselines=[]",
    ]  # fmt: skip
    return resolve(load_config("quickstart", fields))


def now(tokens: float) -> Clock:
    return tokens, time.perf_counter(), time.process_time()


def prepared(run: Specification, tokens: int) -> tuple[Clock, Clock]:
    before = now(0)
    steps.prepare_tokens(run)
    return before, now(tokens)


def extracted(run: Specification, tokens: int) -> tuple[Clock, Clock]:
    before = now(0)
    steps.extract(run)
    return before, now(tokens)


def trained(run: Specification, tokens: int) -> tuple[Clock, Clock]:
    found: list[Clock] = []
    steps.train(run, lambda points: found.append(now(points[-1]["tokens"])))
    return found[0], found[-1]


def evaluated(run: Specification, tokens: int) -> tuple[Clock, Clock]:
    before = now(0)
    steps.evaluate(run)
    return before, now(run.config.evaluation.tokens)


STAGES = {"tokens": prepared, "extraction": extracted, "training": trained, "evaluation": evaluated}


def measure(stage: str, root: Path, tokens: int) -> dict[str, float]:
    """In this process; a million tokens' seconds."""
    few = configured(root / "few", FEW)
    STAGES[stage](few, FEW)
    before, after = STAGES[stage](configured(root / str(tokens), tokens), tokens)
    count, wall, processor = (last - first for first, last in zip(before, after, strict=True))
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"clock": 1e6 * wall / count, "processor": 1e6 * processor / count, "peak_MB": int(peak[1]) * 1024 / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to write, a temporary folder by default")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", nargs=3, metavar=("STAGE", "ROOT", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        stage, root, tokens = arguments.stage
        print(json.dumps(measure(stage, Path(root), int(tokens))))
        return
    one, ten, load = arguments.tokens, 10 * arguments.tokens, os.getloadavg()[0]
    found: dict[str, dict[int, list[dict[str, float]]]] = {stage: {one: [], ten: []} for stage in STAGES}
    for number in range(arguments.rounds):
        for tokens in (one, ten, one):
            with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="sae-growth-") as root:
                for stage in STAGES:
                    command = [sys.executable, __file__, "--stage", stage, root, str(tokens)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(done.stderr)
                    found[stage][tokens].append(json.loads(done.stdout.splitlines()[-1]))
                    print(number, tokens, stage, found[stage][tokens][-1], os.getloadavg()[0], file=sys.stderr, flush=True)
    result: dict[str, Any] = {"tokens": [one, ten], "load": [load, os.getloadavg()[0]]}
    for stage, sizes in found.items():
        small, large = ({key: median(each[key] for each in sizes[size]) for key in sizes[size][0]} for size in (one, ten))
        result[stage] = {"one": small, "ten": large, "ratio": {key: large[key] / small[key] for key in small}}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
