"""Training while the language model runs, against training from disk: `python benchmarks/online.py --out FOLDER`.

`loss`: for each seed the quickstart's coder from disk, and online with `--mixed` generations read side by side, both evaluated
on the same held-out text. `wait`: a coder that takes longer than its activations, and how much of its time it waits for them.
While a training is online, the bytes under its folder are summed every 10 ms. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from components import steps
from components.run.config import load_config
from components.run.estimate import estimate
from components.run.specification import Specification, resolve

MEASURED = ("evaluation.tokens=40_000", "evaluation.baselines=[]")


@contextmanager
def sampled(folder: str) -> Iterator[list[int]]:
    """The largest sum of the sizes of all files in a folder, as it is found."""
    most, samples, ended = [0, 0], 0, threading.Event()

    def sample() -> None:
        nonlocal samples
        while not ended.wait(0.01):
            found: dict[int, int] = {}
            for place, _, names in os.walk(folder):
                for name in names:
                    with suppress(FileNotFoundError):
                        status = os.stat(os.path.join(place, name))
                        found[status.st_ino] = status.st_size  # a shard has two names while it is put
            samples += 1
            most[:] = [max(most[0], sum(found.values())), samples]

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def trained(run: Specification) -> dict[str, Any]:
    """What a training came to, and what it took."""
    said = estimate(run)["activations"].get("online")
    started = time.monotonic()
    with sampled(run.dataset_url) as most:
        if said is None:
            steps.extract(run)
        record = steps.train(run)
    seconds = time.monotonic() - started
    found: dict[str, Any] = {"seconds": round(seconds, 1), "waiting_for_data": record.waiting_for_data}
    if said is not None:
        after = estimate(run)["activations"]["online"]
        found |= {
            "generations": after["generations"], "disk_bytes": run.config.activations.disk_bytes, "most_bytes": most[0],
            "samples": most[1], "plan_before": said["training_waits"], "plan_after": after["training_waits"],
            "extraction_tokens_per_second": round(after["extraction_tokens_per_second"]),
            "training_tokens_per_second": round(after["training_tokens_per_second"]),
        }  # fmt: skip
    return found


def measured(run: Specification) -> dict[str, float]:
    metrics = steps.evaluate(run).metrics
    return {"loss": 1 - metrics["explained_variance"], "loss_recovered": metrics["loss_recovered"], "l0": metrics["l0"]}


def configured(name: str, out: Path, tokens: int, generation: int, disk: int, *more: str) -> Specification:
    online = [] if not generation else [
        "activations.mode=online", f"activations.generation_tokens={generation}", f"activations.disk_bytes={disk}",
        f"activations.rows_per_shard={generation}",
    ]  # fmt: skip
    fields = [f"storage.root={out}", "device=cpu", f"corpus.train_tokens={tokens}", *MEASURED, *online, *more]
    return resolve(load_config(name, fields))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--generation", type=int, default=80_000)
    parser.add_argument("--mixed", type=int, default=8)
    parser.add_argument("--disk", type=int, default=230_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, Any] = {"load": os.getloadavg()[0], "stored": [], "online": []}
    for name, generation in (("online", options.generation), ("stored", 0)):
        for seed in range(options.seeds):
            mixed = (f"activations.generations_mixed={options.mixed}",) if generation else ()
            fields = (f"seed={seed}", f"training.tokens={options.tokens}", *mixed)
            run = configured("quickstart", options.out, options.tokens, generation, options.disk, *fields)
            result[name].append({"seed": seed, **trained(run), **measured(run)})
            print(json.dumps(result[name][-1]), flush=True)
    for name in ("stored", "online"):
        losses = [found["loss"] for found in result[name]]
        result[f"{name}_loss"] = {"mean": mean(losses), "spread": stdev(losses) if len(losses) > 1 else None}
    slow = ("sae.expansion_factor=64", "training.tokens=200_000", "activations.generations_mixed=2")
    result["wait"] = trained(configured("paper", options.out, 200_000, 50_000, options.disk, *slow))
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
