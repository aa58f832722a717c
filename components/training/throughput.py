"""How fast a training goes: shown while it does, and no part of its curves, which are the same however fast it was."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from components.sae.coder import Coder
from components.sae.kernels.sparse import goes_by_the_chosen

PEAK_AFTER_SECONDS = 20.0
"""Of training: before, it is not worth the time to measure the device's peak."""
_PEAK_SIZE = {"cpu": 1_024, "cuda": 8_192}
"""Of the square product by which the peak of a device is measured."""


def token_flops(coder: Coder, x: Tensor) -> float:
    """Arithmetic of a training step by token: per weight 2 forward, and 2 for each gradient (of what is read none is needed).
    Where a coder chooses k features and computes no others, as on x it would, all but the encoder's forward is over those;
    what else is left out because features are zero counts as done."""
    k = getattr(coder.settings, "k", None)
    if k is not None and goes_by_the_chosen(x, coder.d_sae, coder.mesh is None):
        return float(2 * coder.d_in * coder.d_sae + k * (2 * coder.d_in + 6 * coder.d_out))
    return float((4 * coder.d_in + 6 * coder.d_out) * coder.d_sae)


@cache
def peak_flops(device: torch.device, half: bool) -> float:
    """FLOPs in a second of one square product in float32, or in bfloat16, the best of five; measured once in a process, within
    0.2 s on the CPU that it was tried on."""
    size, generator = _PEAK_SIZE[device.type], torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        started = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Mark:
    """What there was at some moment, of this process."""

    seconds: float
    waited: float
    tokens: int
    flops: float


@dataclass
class Throughput:
    """Of a training that begins now, of coders that share their batches."""

    device: torch.device
    half: bool
    """Whether products are in bfloat16."""
    waited: float = 0.0
    """Seconds without data."""
    tokens: int = 0
    flops: float = 0.0
    """Of all coders."""
    _begun: float = field(default_factory=lambda: time.monotonic())
    _marks: dict[int, _Mark] = field(default_factory=dict)

    def took(self, coder: Coder, x: Tensor) -> None:
        """A step of one of the coders on x `[n, d_in]`."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half):  # as the step is
            self.flops += len(x) * token_flops(coder, x)

    def since(self, place: int, tokens_left: int) -> dict[str, float]:
        """Since this was asked for that coder last: tokens in a second, the share of the time in which there was no data, the
        arithmetic of all coders over the device's peak (`mfu`), and the seconds that are left at this rate."""
        now = _Mark(time.monotonic(), self.waited, self.tokens, self.flops)
        then = self._marks.get(place, _Mark(self._begun, 0.0, 0, 0.0))
        self._marks[place] = now
        seconds = now.seconds - then.seconds
        if seconds <= 0 or now.tokens == then.tokens:
            return {}
        rate = (now.tokens - then.tokens) / seconds
        found = {
            "tokens_per_second": rate, "waiting_for_data": (now.waited - then.waited) / seconds,
            "seconds_left": tokens_left / rate,
        }  # fmt: skip
        if now.seconds - self._begun >= PEAK_AFTER_SECONDS:
            found["mfu"] = (now.flops - then.flops) / seconds / peak_flops(self.device, self.half)
        return found


def said(point: Mapping[str, float]) -> str:
    """What is said of a point of the curves beside the progress."""
    note = f"loss {point['loss']:.2f}, l0 {point['l0']:.1f}, dead {point['dead_fraction']:.3f}"
    if "waiting_for_data" in point:
        note += f", waits {point['waiting_for_data']:.0%}"
    return note + (f", mfu {point['mfu']:.0%}" if "mfu" in point else "")
