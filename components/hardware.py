"""The machine: which device to compute on, and how to keep its memory allocator out of the way."""

from __future__ import annotations

import ctypes
import sys

import torch

from components.settings import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tell glibc to keep freed buffers for the next step instead of handing them back to the kernel.

    Every step frees and asks again for the same few buffers of many megabytes; by default each is a fresh `mmap` whose
    pages the kernel zeroes one fault at a time, which was measured to cost a quarter of a training step on a CPU.
    Does nothing where the C library is another one.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; any other name must be there, or it is a UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: '{name}' is not one of auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: '{name}' is not on this machine, which has {torch.cuda.device_count()} CUDA devices")
    return device
