"""A whole training step of ours against the peers' and against the bare encoder product, in one process and one run:
`python benchmarks/engine.py --peers FOLDER`, where pip has installed SAELens and sparsify without their requirements (pins:
PACKAGES in `tests/integration/conftest.py`).

Everything gets the same batch in turn, round by round, so that whatever else the machine does meets all of them: the figures
are medians over rounds, the ratios medians of each round's. Step: forward, backward, clipping where the library has it, Adam,
its counters of dead features. Prints one JSON object. `--only NAME --memory`: the peak memory of one of them as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from components.hardware import keep_freed_memory
from components.sae.architectures import architectures
from components.sae.coder import Column
from components.training.job import Training
from components.training.settings import TrainingSettings
from components.training.step import CoderInTraining, new_coder, take_step

Step = Callable[[], Any]
STEPS = 1_000_000


def ours(name: str, batch: torch.Tensor, d_sae: int, k: int) -> Step:
    return in_training(name, batch, d_sae, k)[1]


def in_training(name: str, batch: torch.Tensor, d_sae: int, k: int) -> tuple[CoderInTraining, Step]:
    size, d_in = batch.shape
    kind, settings = architectures()[name], TrainingSettings(batch_size=size, tokens=STEPS * size, learning_rate=1e-4)
    options = {} if name == "relu" else {"k": k}
    column = (Column("x", d_in),)
    job = Training(
        url="", digest="", identity={}, settings=settings, coder=kind.Settings(d_sae=d_sae, **options), dataset_url="",
        reads=("x",), writes=("x",), seed=0, metadata={},
    )  # fmt: skip
    training, mean = new_coder(job, column, column, batch.device), torch.zeros(d_in)
    if name == "relu":
        make_sparse(training.coder, batch, k)
    return training, lambda: take_step(training, settings, batch, batch, mean, measured=False)


@torch.no_grad()
def make_sparse(coder: Any, batch: torch.Tensor, k: int) -> None:
    """Biases with which about k features fire on a token, as in a trained ReLU."""
    coder.fire_on(batch[:512], k / coder.d_sae)


def saelens(name: str, batch: torch.Tensor, d_sae: int, k: int) -> Step:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    size, d_in = batch.shape
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "relu": ("Standard", {}), "topk": ("TopK", {"k": k}), "batchtopk": ("BatchTopK", {"k": k}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": k, "matryoshka_widths": [d_sae // 4, d_sae // 2, d_sae]}),
    }  # fmt: skip
    kind, options = kinds[name]
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=d_in, d_sae=d_sae, **options)
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    if name == "relu":
        with torch.no_grad():
            before = batch[:512] @ sae.W_enc
            sae.b_enc.copy_(-before.kthvalue(512 - max(1, round(512 * k / d_sae)) + 1, dim=0).values)
    settings = SAETrainerConfig(
        total_training_samples=STEPS * size,
        train_batch_size_samples=size,
        lr=1e-4,
        lr_end=1e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter([batch]))
    return lambda: trainer._train_step(sae=sae, sae_in=batch)


def sparsify(batch: torch.Tensor, d_sae: int, k: int, unit_rows: bool) -> Step:
    """unit_rows: as its trainer has it by default, decoder rows are brought to length 1 before a step, and the gradient along
    them is taken away after it."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(batch.shape[1], SparseCoderConfig(num_latents=d_sae, k=k, normalize_decoder=unit_rows))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    silent = torch.zeros(d_sae, dtype=torch.long)

    def step() -> None:
        if unit_rows:
            sae.set_decoder_norm_to_unit_norm()
        dead = silent > 10_000_000
        found = sae(batch, dead_mask=dead if bool(dead.any()) else None)
        (found.fvu + found.auxk_loss / 32).backward()
        if unit_rows:
            sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(batch))
        silent[found.latent_indices.flatten()] = 0

    return step


def product(batch: torch.Tensor, d_sae: int) -> Step:
    weight, bias = torch.randn(d_sae, batch.shape[1]) / 28, torch.zeros(d_sae)

    @torch.no_grad()
    def step() -> None:
        torch.nn.functional.linear(batch, weight, bias)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--batch", type=int, default=4_096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    d_sae, k = arguments.d_sae, arguments.k
    batch = torch.randn(arguments.batch, arguments.d_in, generator=torch.Generator().manual_seed(0))
    makers: dict[str, Callable[[], Step]] = {"encoder product": lambda: product(batch, d_sae)}
    names = ("topk", "batchtopk", "matryoshka", "relu")
    makers |= {f"ours {name}": lambda name=name: ours(name, batch, d_sae, k) for name in names}
    if arguments.peers:
        sys.path.insert(1, str(arguments.peers))
        makers |= {f"saelens {name}": lambda name=name: saelens(name, batch, d_sae, k) for name in names}
        makers["sparsify topk"] = lambda: sparsify(batch, d_sae, k, unit_rows=True)
        makers["sparsify topk, free rows"] = lambda: sparsify(batch, d_sae, k, unit_rows=False)
    chosen = arguments.only or list(makers)
    before = peak()
    steps = {name: makers[name]() for name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(arguments.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    shape = {"d_in": arguments.d_in, "d_sae": d_sae, "batch": arguments.batch, "k": k, "threads": torch.get_num_threads()}
    found: dict[str, Any] = {"shape": shape, "seconds": {name: round(median(times), 4) for name, times in seconds.items()}}
    if arguments.memory:
        found["peak_bytes"] = peak() - before
    for name in names:
        mine = seconds.get(f"ours {name}")
        if mine:
            for other in ("encoder product", f"saelens {name}", f"sparsify {name}", f"sparsify {name}, free rows"):
                if other in seconds:
                    ratios = [theirs / own for theirs, own in zip(seconds[other], mine, strict=True)]
                    found[f"{other} / ours {name}"] = round(median(ratios), 3)
    print(json.dumps(found, indent=1))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
