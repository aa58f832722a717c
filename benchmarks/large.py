"""A step, an evaluation and feature statistics at a million features, and what memory they take beside the weights:
`python benchmarks/large.py` (`d_sae` 1,048,576, `d_in` 64, batch 1,024, k 32). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from engine import in_training, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=64)
    parser.add_argument("--d-sae", type=int, default=1 << 20)
    parser.add_argument("--batch", type=int, default=1_024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--architecture", default="topk")
    arguments = parser.parse_args()
    batch = torch.randn(arguments.batch, arguments.d_in, generator=torch.Generator().manual_seed(0))
    before = peak()
    training, step = in_training(arguments.architecture, batch, arguments.d_sae, arguments.k)
    coder = training.coder
    weights = sum(parameter.numel() * parameter.element_size() for parameter in coder.parameters())
    found = {"weights_bytes": weights, "batch_d_sae_bytes": 4 * arguments.batch * arguments.d_sae}
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        step()
        seconds.append(round(time.perf_counter() - started, 2))
    found |= {"step_seconds": seconds[-1], "step_peak_bytes": peak() - before}
    with torch.no_grad():
        started = time.perf_counter()
        features, written = coder.reconstruct(batch)
        (written - batch).square().sum()
        features.fired(), features.sums(), features.largest(), features.active()
        found |= {"evaluation_seconds": round(time.perf_counter() - started, 2), "with_evaluation_peak_bytes": peak() - before}
    found["process_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
