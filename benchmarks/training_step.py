"""An SAE training step against the matrix products that it cannot do without: `python benchmarks/training_step.py`.

The limit is the time of the five products of an SAE's step (two forward, three backward) into preallocated outputs,
in the same run on the same machine. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from components.hardware import keep_freed_memory, resolve_device
from components.sae.architectures.relu import ReLUSettings
from components.sae.coder import Column
from components.training.job import Training
from components.training.settings import TrainingSettings
from components.training.step import new_coder, take_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = resolve_device(arguments.device)
    d_in, d_sae, batch = arguments.d_in, arguments.d_sae, arguments.batch
    x = torch.randn(batch, d_in, device=device)
    mean = torch.zeros(d_in, device=device)
    settings = TrainingSettings(batch_size=batch, tokens=1000 * batch)
    column = (Column("x", d_in),)
    job = Training(
        url="", digest="", identity={}, settings=settings, coder=ReLUSettings(d_sae=d_sae), dataset_url="", reads=("x",),
        writes=("x",), seed=0, metadata={},
    )  # fmt: skip
    training = new_coder(job, column, column, device)

    f, g = torch.randn(batch, d_sae, device=device), torch.randn(batch, d_in, device=device)
    w, v = torch.randn(d_in, d_sae, device=device), torch.randn(d_sae, d_in, device=device)
    wide, narrow, decoder, encoder = f.clone(), g.clone(), v.clone(), w.clone()

    def products() -> None:
        torch.mm(x, w, out=wide)
        torch.mm(f, v, out=narrow)
        torch.mm(f.T, g, out=decoder)
        torch.mm(g, v.T, out=wide)
        torch.mm(x.T, f, out=encoder)

    def step() -> None:
        training.step = 500
        take_step(training, settings, x, x, mean, measured=False)

    # Interleaved, so that whatever else the machine does meets both.
    seconds = {"step": 0.0, "products": 0.0}
    for _ in range(10):
        seconds["step"] += timed(step, arguments.steps // 10, device)
        seconds["products"] += timed(products, arguments.steps // 10, device)
    rate = {name: arguments.steps * batch / value for name, value in seconds.items()}
    shape = {"d_in": d_in, "d_sae": d_sae, "batch": batch}
    print(json.dumps({"device": str(device), **shape, "tokens_per_second": rate, "share": rate["step"] / rate["products"]}))


def timed(function: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds of `count` calls, after two that warm up."""
    for _ in range(2):
        function()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(count):
        function()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
