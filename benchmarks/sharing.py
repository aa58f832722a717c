"""What trainings on one machine share, and what they cannot: `python benchmarks/sharing.py`, on an idle machine.

`products`: the three kinds of product of a dense step (encoder, decoder, gradient of a weight) for 8 coders of 128 x 1,024 on
1,024 tokens, each for itself, as one `torch.bmm`, and side by side as one wide product: the time, interleaved in one run, the
best of `REPEATS`, how near it is to the device's peak, and whether the bits are the same. `neighbours`: bare ReLU steps of that
size in one process and in two at once, as the project starts them, by OpenMP threads of each. Prints two tables.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from components.hardware import keep_freed_memory
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.coder import Progress
from components.threads import with_patient_threads
from components.training.throughput import peak_flops

CODERS, TOKENS, D_IN, D_SAE = 8, 1_024, 128, 1_024
REPEATS, ROUNDS, STEPS = 30, 5, 300
_STEPS = "--steps"


def best(*ways: Callable[[], object]) -> list[float]:
    seconds = [float("inf")] * len(ways)
    for _ in range(REPEATS):
        for place, way in enumerate(ways):
            started = time.perf_counter()
            way()
            seconds[place] = min(seconds[place], time.perf_counter() - started)
    return seconds


def take_steps() -> None:
    """In a process of its own: starts when it is told so, and ends with the last step."""
    keep_freed_memory()
    coder = ReLUSAE.autoencoder(ReLUSettings(d_sae=D_SAE), D_IN)
    coder.initialise(0)
    optimizer = torch.optim.Adam(coder.parameters(), fused=True)
    x = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        coder.losses(x, x, Progress(0, 1)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(STEPS):
        step()


def together(processes: int, threads: int) -> float:
    """Seconds from the start of all to the end of the last."""
    environment = with_patient_threads({**os.environ, "OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, __file__, _STEPS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen(command, **pipes) for _ in range(processes)]  # type: ignore[call-overload]
    for one in started:
        one.stdout.readline()
    begin = time.perf_counter()
    for one in started:
        one.stdin.write("\n")
        one.stdin.flush()
    assert [one.wait() for one in started] == [0] * processes
    return time.perf_counter() - begin


def neighbours() -> None:
    print("| threads of each | one, tokens/s | two at once / one, best of rounds | in each round |\n|---|---|---|---|")
    for threads in (1, 2):
        rounds = [(together(1, threads), together(2, threads)) for _ in range(ROUNDS)]
        one, two = (min(times) for times in zip(*rounds, strict=True))
        each = ", ".join(f"{other / alone:.2f}" for alone, other in rounds)
        print(f"| {threads} | {STEPS * TOKENS / one:,.0f} | {two / one:.2f} | {each} |", flush=True)


def main() -> None:
    if sys.argv[1:] == [_STEPS]:
        take_steps()
        return
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} thread(s) for the products\n")
    products()
    print()
    neighbours()
    print(f"\nload {os.getloadavg()[0]:.1f}")


def products() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, encoders, decoders = some(TOKENS, D_IN), some(CODERS, D_IN, D_SAE), some(CODERS, D_SAE, D_IN)
    features = torch.relu(some(CODERS, TOKENS, D_SAE))
    wide = encoders.permute(1, 0, 2).reshape(D_IN, CODERS * D_SAE).contiguous()
    sides = features.permute(1, 0, 2).reshape(TOKENS, CODERS * D_SAE).contiguous()
    every = x.expand(CODERS, TOKENS, D_IN)
    kinds: dict[str, tuple[Callable[[], list[Tensor]], Callable[[], Tensor], Callable[[], Tensor] | None]] = {
        "encoder, x W_enc": (
            lambda: [x @ one for one in encoders],
            lambda: torch.bmm(every, encoders),
            lambda: (x @ wide).reshape(TOKENS, CODERS, D_SAE).permute(1, 0, 2),
        ),
        "decoder, f W_dec": (
            lambda: [one @ rows for one, rows in zip(features, decoders, strict=True)],
            lambda: torch.bmm(features, decoders),
            None,
        ),
        "gradient, x^T f": (
            lambda: [x.T @ one for one in features],
            lambda: torch.bmm(every.transpose(1, 2), features),
            lambda: (x.T @ sides).reshape(D_IN, CODERS, D_SAE).permute(1, 0, 2),
        ),
    }
    print("| product | eight alone | of peak | `bmm` / alone | same bits | one wide / alone | same bits |")
    print("|---|---|---|---|---|---|---|")
    peak, arithmetic = peak_flops(torch.device("cpu"), False), 2.0 * CODERS * TOKENS * D_IN * D_SAE
    for name, (alone, batched, side_by_side) in kinds.items():
        expected = torch.stack(alone())
        ways = [alone, batched] + ([] if side_by_side is None else [side_by_side])
        seconds = best(*ways)
        row = [f"{seconds[0] * 1e3:.1f} ms", f"{arithmetic / seconds[0] / peak:.0%}"]
        for way, took in zip(ways[1:], seconds[1:], strict=True):
            row += [f"{took / seconds[0]:.2f}", "yes" if torch.equal(torch.as_tensor(way()), expected) else "no"]
        row += [""] * (6 - len(row))
        print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
