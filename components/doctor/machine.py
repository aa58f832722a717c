"""GPU, processor, memory and limits of this machine."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from components.doctor.check import Check, human_bytes

_LITTLE_MEMORY_BYTES = 2_000_000_000
_LITTLE_SHARED_BYTES = 128_000_000  # Docker gives 64 MiB
_FEW_FILES = 1024
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def device_checks(device: str) -> Iterator[Check]:
    """torch's build and every GPU, for the `device` of a configuration; each GPU multiplies two small matrices."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build for the CPU alone"
    yield Check("device", "torch", "ok", f"{torch.__version__}, {build}")
    with warnings.catch_warnings(record=True) as said:  # torch tells in a warning why it cannot use a GPU
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        yield _without_gpu(device, torch.version.cuda, " ".join(" ".join(str(warning.message).split()) for warning in said))
    for number in range(count):
        yield _gpu(number)


def _without_gpu(device: str, cuda: str | None, said: str) -> Check:
    present = any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
    if not present:
        if device.startswith("cuda"):
            advice = "Set device to cpu or auto, or run on a machine with an NVIDIA GPU (in a container: `--gpus all`)."
            return Check("device", "GPU", "failure", f"none, and device is {device}", advice)
        return Check("device", "GPU", "ok", "none: the CPU computes")
    if device == "cpu":
        return Check("device", "GPU", "ok", "there is one, and device is cpu")
    if cuda is None:
        advice = "Install torch's CUDA build: `pip install --force-reinstall torch==VERSION` without a CPU index of wheels."
        return Check("device", "GPU", "failure", "this machine has one, and torch is built for the CPU alone", advice)
    driver = _driver()
    advice = (
        f"Update the NVIDIA driver to one for CUDA {cuda} or later, or see that it is loaded and visible here (`nvidia-smi`; "
        "CUDA_VISIBLE_DEVICES; in a container `--gpus all`)."
    )
    found = f"torch cannot use the GPU of this machine{driver and f' ({driver})'}{said and f': {said[:200]}'}"
    return Check("device", "GPU", "failure", found, advice)


def _driver() -> str:
    """The driver's version and the newest CUDA that it can do, empty where it does not answer."""
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        newest = pynvml.nvmlSystemGetCudaDriverVersion()
        return f"driver {pynvml.nvmlSystemGetDriverVersion()}, for CUDA up to {newest // 1000}.{newest % 1000 // 10}"
    except Exception:  # no driver, or one too old for the question
        return ""


def _gpu(number: int) -> Check:
    import torch

    name, what = f"GPU {number}", f"cuda:{number}"
    try:
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        half = properties.major >= 8
        ones = torch.ones(64, 64, device=what, dtype=torch.bfloat16 if half else torch.float32)
        right = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        advice = (
            f"Install a torch build for this GPU, update its driver, or leave it out with CUDA_VISIBLE_DEVICES ({_driver()})."
        )
        return Check("device", name, "failure", f"does not compute: {' '.join(str(error).split())[:200]}", advice)
    kinds = "bfloat16" if half else "no bfloat16"
    found = f"{properties.name}, {human_bytes(free)} of {human_bytes(total)} free, {kinds} ({_driver()})"
    if not right:
        return Check(
            "device", name, "failure", f"{found}: a product is wrong", "Take this GPU out of use: it computes wrongly."
        )
    if free < total / 2:
        return Check("device", name, "warning", found, "Another process holds most of its memory: see `nvidia-smi`.")
    return Check("device", name, "ok", found)


def machine_checks(memory_needed: int | None = None) -> Iterator[Check]:
    """Processors, memory (bytes), shared memory and open files, as far as this process may use them."""
    yield _processors()
    yield _memory(memory_needed)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        found = f"{human_bytes(size)} in {shared}"
        if size < _LITTLE_SHARED_BYTES:
            advice = "Give the container more (`docker run --shm-size=2g`): Ray and several GPUs exchange data there."
            yield Check("machine", "shared memory", "warning", found, advice)
        else:
            yield Check("machine", "shared memory", "ok", found)
    with suppress(ImportError):  # not on Windows
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = 0 <= soft < _FEW_FILES
        advice = f"Raise the limit before a run: `ulimit -n {4 * _FEW_FILES}`."
        yield Check("machine", "open files", "warning" if few else "ok", f"at most {soft:,}", advice if few else None)


def _processors() -> Check:
    import torch

    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with suppress(OSError, ValueError):  # "max 100000" is no limit
        quota, period = (_CONTROL_GROUP / "cpu.max").read_text().split()
        usable = min(usable, int(quota) / int(period))
    threads = torch.get_num_threads()
    found = f"{usable:g} usable, torch computes with {threads} {'threads' if threads != 1 else 'thread'}"
    if threads > usable + 0.5:
        advice = f"Set OMP_NUM_THREADS={max(1, round(usable))}: more threads than processors slow each other down."
        return Check("machine", "processors", "warning", found, advice)
    return Check("machine", "processors", "ok", found)


def _memory(needed: int | None) -> Check:
    import psutil

    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        limit = int((_CONTROL_GROUP / "memory.max").read_text())
        available = min(available, limit - int((_CONTROL_GROUP / "memory.current").read_text()))
    found = f"{human_bytes(available)} available" + (f", about {human_bytes(needed)} needed" if needed is not None else "")
    if available < (needed if needed is not None else _LITTLE_MEMORY_BYTES):
        advice = "End other programs, use a larger machine, or make activations.rows_per_shard and training.batch_size smaller."
        return Check("machine", "memory", "warning", found, advice)
    return Check("machine", "memory", "ok", found)
