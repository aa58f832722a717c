"""Where the time of a training step goes: some steps of a training under torch's profiler, of which nothing else is kept."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from components.hardware import keep_freed_memory
from components.training.batches import open_source, scaled_batches, scaled_mean, side_by_side, statistics, training_manifest
from components.training.beginning import begin_from_data
from components.training.checkpoint import restore_checkpoint
from components.training.job import Training
from components.training.start import load_start
from components.training.step import new_coder, take_step
from components.training.throughput import peak_flops, synchronise, token_flops

_WARM, _TIMED, _TRACED = 3, 10, 5
_SHOWN = 12


def profile_steps(job: Training, device: torch.device, trace: Path) -> dict[str, Any]:
    """Take steps from where the training is, its last checkpoint or its start, and forget them; the trace, for
    chrome://tracing or Perfetto, is put at `trace`.

    `of_peak` is the arithmetic of a step, see `token_flops`, over the measured peak of the device.
    """
    keep_freed_memory()
    settings = job.settings
    manifest = training_manifest(job)
    reads, writes = statistics(manifest, job.reads), statistics(manifest, job.writes)
    training = new_coder(job, tuple(one.column for one in reads), tuple(one.column for one in writes), device)
    if not restore_checkpoint(training, job.url):
        if job.start is None or job.start.location.startswith("models:/"):  # of a finished training it is not fetched
            begin_from_data(training.coder, job, reads, writes)
        else:
            load_start(training.coder, job.start, [one.scale for one in reads], [one.scale for one in writes])
    columns = list({one.column.name: one for one in (*reads, *writes)}.values())
    reader = open_source(job, [one.column.name for one in columns], device)
    mean, waited, flops = scaled_mean(writes, device), 0.0, 0.0
    with closing(scaled_batches(reader, columns, training.step * settings.batch_size, device)) as batches:

        def step() -> None:
            nonlocal waited, flops
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            x = side_by_side(batch, job.reads)
            flops = len(x) * token_flops(training.coder, x)
            take_step(training, settings, x, side_by_side(batch, job.writes), mean, measured=False)

        for _ in range(_WARM):
            step()
        synchronise(device)
        waited, started = 0.0, time.perf_counter()
        for _ in range(_TIMED):
            step()
        synchronise(device)
        seconds = (time.perf_counter() - started) / _TIMED
        waiting = waited / _TIMED
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities) as found:
            for _ in range(_TRACED):
                step()
            synchronise(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    peak = peak_flops(device, settings.autocast == "bfloat16")
    return {
        "device": str(device),
        "seconds_per_step": seconds,
        "tokens_per_second": settings.batch_size / seconds,
        "waiting_for_data": waiting / seconds,
        "measured_peak_tflops": peak / 1e12,
        "of_peak": flops / seconds / peak,
        "operations": _operations(found, device),
        "trace": str(trace),
    }


def _operations(found: profile, device: torch.device) -> dict[str, str]:
    """The operations that take longest: milliseconds in a step, and their share of all."""
    name = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    rows = sorted(((getattr(row, name), row.key) for row in found.key_averages()), reverse=True)
    total = sum(taken for taken, _ in rows) or 1.0
    shown = {key: taken for taken, key in rows[:_SHOWN]}
    shown["everything else"] = sum(taken for taken, _ in rows[_SHOWN:])
    return {key: f"{taken / _TRACED / 1e3:.2f} ms, {taken / total:.1%}" for key, taken in shown.items()}
