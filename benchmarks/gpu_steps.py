"""Whole training steps on a GPU, ours and SAELens', and what of the device's time they take: `gpu.py` runs them."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Shape = tuple[int, int, int, int]
_STEPS = 1_000_000


def timed(function: Callable[[], object], device: torch.device, count: int = 20) -> float:
    """Median of milliseconds, after three calls that warm up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(count):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)[count // 2]


def ours(name: str, batch: torch.Tensor, d_sae: int, k: int, autocast: str) -> Callable[[], object]:
    """The step that `sae train` takes."""
    from components.sae.architectures import architectures
    from components.sae.coder import Column
    from components.training.job import Training
    from components.training.settings import TrainingSettings
    from components.training.step import new_coder, take_step

    size, d_in = batch.shape
    values = {"batch_size": size, "tokens": _STEPS * size, "learning_rate": 1e-4, "autocast": autocast}
    settings, column = TrainingSettings.model_validate(values), (Column("x", d_in),)
    coder = architectures()[name].Settings.model_validate({"d_sae": d_sae, "k": k})
    job = Training(
        url="", digest="", identity={}, settings=settings, coder=coder, dataset_url="",
        reads=("x",), writes=("x",), seed=0, metadata={},
    )  # fmt: skip
    training, mean = new_coder(job, column, column, batch.device), torch.zeros(d_in, device=batch.device)
    return lambda: take_step(training, settings, batch, batch, mean, measured=False)


def saelens(name: str, batch: torch.Tensor, d_sae: int, k: int) -> Callable[[], object]:
    """The step of SAELens' trainer, with its own autocast to bfloat16."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK"}[name]
    levels = {"matryoshka_widths": [d_sae // 4, d_sae // 2, d_sae]} if name == "matryoshka" else {}
    device = str(batch.device)
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=batch.shape[1], d_sae=d_sae, k=k, device=device, **levels)
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    settings = SAETrainerConfig(
        total_training_samples=_STEPS * len(batch), train_batch_size_samples=len(batch), lr=1e-4, lr_end=1e-5, device=device,
        autocast=True, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter([batch]))
    return lambda: trainer._train_step(sae=sae, sae_in=batch)


def waits(step: Callable[[], object]) -> str:
    """Where a step waits for the device, if it does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def products(batch: torch.Tensor, d_sae: int, k: int) -> list[Row]:
    """The encoder's product in bfloat16, by parts where the whole would be large; and with the selection behind it."""
    from components.sae.kernels.gpu.selection import strongest_of_rows

    (n, d_in), device, half = batch.shape, batch.device, batch.bfloat16()
    weight, bias = torch.randn(d_sae, d_in, device=device).bfloat16() / d_in**0.5, torch.zeros(d_sae, device=device)
    norms, part = torch.rand(d_sae, device=device) + 0.5, half[: max(128, (1 << 30) // d_sae)]
    product = timed(lambda: torch.nn.functional.linear(part, weight), device) * n / len(part)
    selected = timed(lambda: strongest_of_rows(half, weight, bias, norms, k), device)
    return [{"step": "encoder product", "ms": product}, {"step": "and selection", "ms": selected}]


def steps(device: torch.device, shape: Shape, peak: float, peers: Path | None) -> list[Row]:
    """Each step in bfloat16 products with float32 weights; the encoder's product alone, and with the selection behind it.

    `of_product` is the rate in the encoder's products per second, 1 for the bare product; `of_peak` that product's share of the
    device's peak.
    """
    n, d_in, d_sae, k = shape
    batch, flops = torch.randn(n, d_in, device=device), 2 * n * d_in * d_sae
    rows = products(batch, d_sae, k)
    product = rows[0]["ms"]
    makers: dict[str, Callable[[], Callable[[], object]]] = {}
    for name in ("topk", "batchtopk", "matryoshka"):
        makers[f"ours {name}"] = lambda name=name: ours(name, batch, d_sae, k, "bfloat16")
    if peers is not None:
        sys.path.insert(1, str(peers))
        os.environ.setdefault("WANDB_MODE", "disabled")
        for name in ("topk", "batchtopk", "matryoshka"):
            makers[f"saelens {name}"] = lambda name=name: saelens(name, batch, d_sae, k)
    for name, make in makers.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step = make()
        row = {"step": name, "ms": timed(step, device), "MiB": torch.cuda.max_memory_allocated(device) >> 20}
        rows.append({**row, "waits_for_the_device": waits(step)} if name.startswith("ours") else row)
        del step
    found = {row["step"]: row["ms"] for row in rows}
    for row in rows:
        row |= {"of_product": product / row["ms"], "of_peak": flops / row["ms"] / 1e9 / peak, "shape": shape}
        peer = row["step"].replace("ours", "saelens")
        if peer != row["step"] and peer in found:
            row["times_saelens"] = found[peer] / row["ms"]
    return rows


def continued(device: torch.device) -> list[Row]:
    """A training on the quickstart's activations that is stopped at five random steps and goes on each time, against one that
    is not: the weights, bit for bit. The second coder's by the Triton kernels."""
    found = []
    for architecture, more in (("batchtopk", []), ("topk", ["sae.expansion_factor=128", "training.autocast=bfloat16"])):
        os.environ["SAE_TRITON"] = "1" if more else ""
        settings = [f"device={device}", "training.tokens=300000", f"sae.architecture={architecture}", *more]
        digests = [_trained(device, settings, times) for times in (0, 5)]
        same = digests[0] == digests[1]
        found.append({"continued": architecture, "stops": 5, "digest": digests[0][:16], "passed": same})
    os.environ.pop("SAE_TRITON")
    return found


def _trained(device: torch.device, settings: list[str], times: int) -> str:
    """What the weights of a training come to that is stopped so many times."""
    from components import steps as line
    from components.run.config import load_config
    from components.run.specification import resolve
    from components.training.loop import Stopped, train

    with tempfile.TemporaryDirectory() as root:
        run = resolve(load_config("quickstart", [f"storage.root={root}", *settings]))
        line.prepare_tokens(run)
        line.extract(run)
        job = run.training()
        draw = random.Random(0)
        stops = sorted(draw.sample(range(5, job.steps), times))
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return bool(stops) and asked == stops[0]

        while True:
            try:
                return train(job, device, should_stop=stop).weights_sha256
            except Stopped as stopped:
                asked = stopped.step
                stops.pop(0)
