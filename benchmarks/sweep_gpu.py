"""A sweep on one GPU and the machine's cores, what it recommends for three times its budget, and five random settings of that
budget, all trained: `python benchmarks/sweep_gpu.py OUT [SEED]`, OUT a folder for `sweep-gpu.json`. Under four minutes.

Children are as `sae sweep` has them, without Prefect and MLflow: each in one of several processes, whose steps wait for
launches and not for the GPU. The random settings are drawn, and begin, before anything is known of the sweep.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from components import steps
from components.run.config import load_config
from components.run.estimate import dense_flops
from components.run.specification import Specification, resolve
from components.sweeps.grid import child_of, children
from components.sweeps.recommendation import predicted, recommend
from components.sweeps.record import SweepPoint, SweepRecord
from components.sweeps.scaling import fit_sweep
from components.sweeps.work import point_of

GRID = {
    "sae.d_sae": [256, 512, 1024, 2048],
    "training.tokens": [300_000, 600_000, 1_200_000, 2_400_000],
    "training.learning_rate": [1.5e-3, 3e-3, 6e-3, 1.2e-2],
}
SETTINGS = (
    "corpus.train_tokens=4000000",  # all that the standard library has
    "evaluation.tokens=20000",
    "evaluation.baselines=[]",
    "evaluation.neighbours=0",
    "training.dead_after_share=0.05",
    "training.checkpoint_tokens=100000000",
    "training.log_tokens=200000",
)
TIMES, DRAWN, RATES = 3, 5, (1e-3, 2e-3, 4e-3, 8e-3)
ON_CORES = 512
"""Features up to which a core is as fast as a process on the GPU."""
PROCESSES = {"gpu": 8, "cores": 7, "end": 5}
SWEEP_SECONDS, SECONDS = 138.0, 230.0
"""What is left of the sweep is given up after the first, and everything after the second."""


def ready() -> None:
    """What a process does first: its imports."""


def train(specification: str, values: dict[str, Any], device: str) -> tuple[dict[str, Any], float]:
    """A child, trained and measured: its point of the sweep, and the seconds that its training took."""
    child = child_of(Specification.from_json(specification).model_copy(update={"device_name": device}), values)
    began = time.monotonic()
    steps.train(child.run)
    seconds = time.monotonic() - began
    return point_of(child, "finished", steps.evaluate_together([child.run])[0]).model_dump(mode="json"), seconds


class Trainings:
    def __init__(self, base: Specification, pools: dict[str, ProcessPoolExecutor], began: float) -> None:
        self.base, self._pools, self._began = base, pools, began
        self._going: dict[Future[Any], tuple[str, dict[str, Any]]] = {}
        self.done: list[dict[str, Any]] = []

    def give(self, kind: str, pool: str, values: dict[str, Any]) -> None:
        device = "cpu" if pool == "cores" else self.base.device_name
        self._going[self._pools[pool].submit(train, self.base.to_json(), values, device)] = kind, values

    def wait(self, until: float, *kinds: str) -> list[SweepPoint]:
        """For those of these kinds; what has finished of them."""
        while any(kind in kinds for kind, _ in self._going.values()) and time.monotonic() - self._began < until:
            for one in wait(list(self._going), timeout=1.0, return_when=FIRST_COMPLETED).done:
                kind, values = self._going.pop(one)
                if (error := one.exception()) is not None:
                    print(f"{kind} {values}: {error!r}", flush=True)
                    continue
                point, seconds = one.result()
                self.done.append({"kind": kind, "point": point, "seconds": seconds})
        for one in [one for one, (kind, _) in self._going.items() if kind in kinds]:
            one.cancel()
            del self._going[one]
        return [SweepPoint.model_validate(row["point"]) for row in self.done if row["kind"] in kinds]


def setting(base: Specification, features: float, budget: float, per_feature: float, rate: float) -> dict[str, Any]:
    n, size = 8 * round(features / 8), base.config.training.batch_size
    tokens = max(1, round(budget / per_feature / n / size)) * size
    return {"sae.d_sae": n, "training.tokens": tokens, "training.learning_rate": rate}


def in_order(values: dict[str, Any]) -> tuple[bool, int, int]:
    """The longest first; last the rates at an end that is likely not the best of its length."""
    tokens, rate = values["training.tokens"], values["training.learning_rate"]
    lengths, rates = GRID["training.tokens"], GRID["training.learning_rate"]
    poor = (tokens >= lengths[2] and rate == rates[-1]) or (tokens == lengths[0] and rate == rates[0])
    return poor, -tokens, -values["sae.d_sae"]


def measure(pools: dict[str, ProcessPoolExecutor], seed: int, began: float, result: dict[str, Any]) -> None:
    """Into `result`, as it comes."""
    for name, count in PROCESSES.items():
        for _ in range(count):
            pools[name].submit(ready)  # it imports while the dataset is made
    base = resolve(load_config("quickstart", [*SETTINGS, f"seed={seed}"]))
    stored = steps.extract(base).tokens
    sizes = GRID["sae.d_sae"]
    largest = child_of(base, {field: max(GRID[field]) for field in ("sae.d_sae", "training.tokens")}).run
    one = largest.config.training
    per_feature = dense_flops(largest) / (largest.d_sae * one.steps * one.batch_size)
    budget, generator = TIMES * float(dense_flops(largest)), np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWN):
        features = np.exp(generator.uniform(np.log(0.75 * sizes[-1]), np.log(4 * sizes[-1])))
        drawn.append(setting(base, features, budget, per_feature, float(generator.choice(RATES))))
    print(json.dumps(drawn), flush=True)
    work = Trainings(base, pools, began)
    result |= {"dataset_tokens": stored, "budget": budget, "random": drawn, "trainings": work.done}
    for values in sorted(drawn, key=in_order):
        work.give("random", "gpu", values)
    for values in sorted((child.values for child in children(base, GRID)), key=in_order):
        work.give("sweep", "cores" if values["sae.d_sae"] <= ON_CORES else "gpu", values)
    points = work.wait(SWEEP_SECONDS, "sweep")
    record = SweepRecord(
        digest="", name="sweep on a GPU", grid=GRID, dataset_digest=base.dataset_digest,
        evaluation_tokens=base.config.evaluation.tokens, mlflow_run="", seconds=0.0, points=tuple(points),
    )  # fmt: skip
    fit = fit_sweep(record, base.config)
    result["laws"] = fit.summary().model_dump()
    found = recommend(base, fit, flops=budget)
    result["recommended"] = found.model_dump()
    print(found.model_dump_json(indent=1), flush=True)
    work.give("recommended", "end", found.set)
    for fewer in (8, 16):  # nearly the same, from other weights
        again = setting(base, found.features - fewer, budget, per_feature, found.learning_rate)
        work.give("again", "end", again)
    around = result["around"] = []
    for kind, times in (("smaller", 1 / 1.5), ("larger", 1.5)):
        values = setting(base, times * found.features, budget, per_feature, 0.0)
        n, tokens = values["sae.d_sae"], values["training.tokens"]
        work.give(kind, "end", {**values, "training.learning_rate": float(f"{fit.learning_rate.at(n, tokens):.3g}")})
        around.append({"kind": kind, "features": n, "loss": predicted(fit, n, tokens).model_dump()})
    work.wait(SECONDS, "recommended", "again", "random", "smaller", "larger")


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began, out, seed = time.monotonic(), Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    context = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(count, context) for name, count in PROCESSES.items()}
    result: dict[str, Any] = {}
    try:
        measure(pools, seed, began, result)
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        out.mkdir(parents=True, exist_ok=True)
        (out / "sweep-gpu.json").write_text(json.dumps({"seconds": time.monotonic() - began, **result}, indent=1))


if __name__ == "__main__":
    main()
