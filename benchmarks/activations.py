"""Activation datasets against the limits of the machine: `python benchmarks/activations.py WHAT`, where WHAT is one of

extraction: the whole of extraction against the bare forward pass to the same layer on the same batches, taken in turns.
reading:    the reader's batches against `readinto` of the same bytes into one preallocated array, from a warm local disk;
            and what a training loop waits that consumes 500 MB/s.
s3:         the reader's batches against bare parallel ranged reads of the same ranges, from SeaweedFS on loopback.
memory:     peak memory of extraction, shuffle and reading for a corpus and for ten times as many tokens.
mixing:     distinct documents in batches of 4,096 against a global permutation.

Each prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components import storage
from components.activations.dataset import check, extraction
from components.activations.dataset.forward import run_chunk
from components.activations.dataset.job import chunk_sequences
from components.activations.dataset.manifest import Column, Manifest, Shard
from components.activations.dataset.reader import ActivationReader
from components.activations.dataset.schema import Layout, memory
from components.activations.dataset.shard import write_shard_file
from components.hardware import keep_freed_memory
from components.language_model.hook_points import capture
from components.language_model.loading import forward_inputs, load_model
from components.run.config import parse_config
from components.run.specification import Specification, resolve

BUILTIN = Path(__file__).parent.parent / "components" / "language_model" / "builtin" / "stdlib-llama"
ROWS_PER_GROUP, ROWS_PER_SHARD = 8_192, 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["extraction", "reading", "s3", "memory", "mixing"])
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--folder", default=None, help="where to write, a temporary folder by default")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()
    measure: dict[str, Callable[..., dict[str, Any]]] = {
        "extraction": extraction_overhead, "reading": reading, "s3": s3_reading, "memory": peak_memory, "mixing": mixing
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps({"what": arguments.what, **measure[arguments.what](Path(folder), arguments)}, indent=2))


# extraction


def gpt2_plan(folder: Path, tokens: int, width: int = 768, layers: int = 12, **activations: Any) -> Specification:
    """A GPT-2 with random weights and the tokenizer that ships, on the standard library, stored after half of its blocks."""
    import shutil

    from transformers import GPT2Config, GPT2LMHeadModel

    model = folder / f"gpt2-{layers}x{width}"
    if not model.is_dir():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=width, n_layer=layers, n_head=width // 64)).save_pretrained(model)
        for path in BUILTIN.glob("tokenizer*"):
            shutil.copy(path, model)
    tree = {
        "name": "benchmark",
        "device": "cpu",
        "storage": {"root": str(folder / "root")},
        "corpus": {"source": "standard_library", "context_length": 128, "train_tokens": tokens, "held_out_tokens": 1_000},
        "language_model": {"name": str(model), "batch_sequences": 16},
        "activations": {
            "hook_points": [f"resid_post.{layers // 2 - 1}"], "rows_per_group": ROWS_PER_GROUP, "sequences_per_chunk": 64,
            **activations,
        },
    }  # fmt: skip
    return resolve(parse_config(tree))


def extraction_overhead(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from components import steps

    plan = gpt2_plan(folder, arguments.tokens or 60_000, rows_per_shard=ROWS_PER_GROUP * 2)
    work = plan.extraction(steps.prepare_tokens(plan))
    model = load_model(plan.source, torch.device("cpu"))
    cpu = torch.device("cpu")
    bare = whole = 0.0

    def forward(chunk: int) -> None:
        block = chunk_sequences(work, chunk)
        for start in range(0, len(block), 16):
            capture(model, work.points, forward_inputs(work.source, block[start : start + 16], cpu))

    forward(0)
    # In turns, chunk by chunk, so that whatever else the machine does meets both.
    with ThreadPoolExecutor(1) as writer:
        for chunk in range(work.chunks):
            started = time.perf_counter()
            forward(chunk)
            bare += time.perf_counter() - started
            started = time.perf_counter()
            block = chunk_sequences(work, chunk)
            rows = run_chunk(work.source, model, work.points, block, "float16", cpu)
            writer.submit(extraction.write_chunk, work, chunk, rows).result()  # not overlapped here: all of its cost is counted
            whole += time.perf_counter() - started
    started = time.perf_counter()
    extraction.gather(work, range(work.buckets))
    manifest = extraction.commit(work)
    whole += time.perf_counter() - started
    return {
        "model": "GPT-2, 12 layers, 768 wide, random weights",
        "hook_point": str(plan.point),
        "tokens": manifest.tokens,
        "forward_seconds": bare,
        "extraction_seconds": whole,
        "ratio": whole / bare,
        "bytes_per_token": manifest.bytes / manifest.tokens,
        "allowed_bytes_per_token": 1.03 * (plan.d_in * 2 + 16),
        "share_of_allowed": manifest.bytes / manifest.tokens / (plan.d_in * 2 + 16),
    }


# reading


def made_up_dataset(url: str, tokens: int, width: int) -> Manifest:
    """A dataset of random values, written shard by shard as extraction writes it."""
    layout = Layout({"resid_post.0": width}, "float16")
    shards = []
    for number in range(tokens // ROWS_PER_SHARD):
        records = np.random.default_rng(number).integers(0, 256, (ROWS_PER_SHARD, layout.row_bytes), dtype=np.uint8)
        places = np.arange(number * ROWS_PER_SHARD, (number + 1) * ROWS_PER_SHARD)
        records[:, :8] = (places // 500).astype(np.int64).view(np.uint8).reshape(-1, 8)
        records[:, 8:12] = (places % 500).astype(np.int32).view(np.uint8).reshape(-1, 4)
        name = f"shard-{number:05d}.parquet"
        with storage.whole_file(storage.join(url, name)) as path:
            with np.errstate(all="ignore"):
                written = write_shard_file(
                    records, layout, seed=0, rows_per_group=ROWS_PER_GROUP, compression="none", path=path, name=name
                )
        shards.append(written.shard)
    column = Column(
        hook_point="resid_post.0", d_in=width, dtype="float16", mean=(0.0,) * width, mean_squared_norm=1.0, median_norm=1.0
    )
    return Manifest.sealed(
        identity={}, configuration={}, versions={}, documents=1, rows_per_group=ROWS_PER_GROUP, compression="none", seed=0,
        shards=tuple(shards), columns=(column,),
    )  # fmt: skip


def ranges(manifest: Manifest) -> list[tuple[Shard, int, int]]:
    """(shard, first byte, bytes) of every row group's activations."""
    return [(shard, group.offset, group.bytes) for shard in manifest.shards for group in shard.groups["resid_post.0"]]


def epoch_seconds(batches: Iterator[dict[str, torch.Tensor]], manifest: Manifest) -> float:
    started = time.perf_counter()
    for _ in range(manifest.tokens // 4_096):
        next(batches)
    return time.perf_counter() - started


def reader_seconds(url: str, manifest: Manifest, epochs: int) -> float:
    """Seconds per epoch. What is read ahead when the clock starts is as much as when it stops: the clock starts in the
    middle of reading, right after an epoch in which memory was taken from the system."""
    reader = ActivationReader(url=url, manifest=manifest, columns=("resid_post.0",), batch_size=4_096, seed=0)
    with closing(reader.batches()) as batches:
        epoch_seconds(batches, manifest)
        return sum(epoch_seconds(batches, manifest) for _ in range(epochs)) / epochs


def reading(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    url = str(folder / "dataset")
    manifest = made_up_dataset(url, arguments.tokens or ROWS_PER_SHARD * 8, arguments.d_in)
    total = manifest.tokens * arguments.d_in * 2
    target = np.empty(total, dtype=np.uint8)
    target[:] = 0  # its pages are there
    whole = memory(target)

    def readinto() -> float:
        started = time.perf_counter()
        start = 0
        for shard in manifest.shards:
            with open(f"{url}/{shard.name}", "rb", buffering=0) as stream:
                for group in shard.groups["resid_post.0"]:
                    stream.seek(group.offset)
                    start += stream.readinto(whole[start : start + group.bytes])
        assert start == total
        return time.perf_counter() - started

    plain, ours = [], []
    for _ in range(5):
        plain.append(np.mean([readinto() for _ in range(4)]))
        ours.append(reader_seconds(url, manifest, epochs=4))
    rate = 500e6
    waited, spent = waiting(url, manifest, rate)
    return {
        "d_in": arguments.d_in,
        "bytes": total,
        "readinto_MB_per_s": total / np.median(plain) / 1e6,
        "reader_MB_per_s": total / np.median(ours) / 1e6,
        "share": float(np.median(plain) / np.median(ours)),
        "share_of_each_turn": [round(a / b, 3) for a, b in zip(plain, ours, strict=True)],
        "waiting_share_at_500_MB_per_s": waited / spent,
    }


def waiting(url: str, manifest: Manifest, rate: float) -> tuple[float, float]:
    """Seconds waited for batches, and in all, by a loop that takes as long for each batch as it has bytes at that rate."""
    reader = ActivationReader(url=url, manifest=manifest, columns=("resid_post.0",), batch_size=4_096, seed=0)
    waited = 0.0
    with closing(reader.batches()) as batches:
        next(batches)  # the first window is read before training starts
        started = time.perf_counter()
        for _ in range(2 * (manifest.tokens // 4_096)):
            asked = time.perf_counter()
            batch = next(batches)["resid_post.0"]
            got = time.perf_counter()
            waited += got - asked
            while time.perf_counter() - asked < batch.nbytes / rate:
                batch.sum()  # a trainer keeps the processor busy
        return waited, time.perf_counter() - started


# S3


@contextmanager
def seaweed(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "integration"))
    from seaweed import Seaweed

    folder.mkdir()
    server = Seaweed(folder)
    os.environ.update(server.environment)
    server.start()
    try:
        server.wait_until_ready()
        storage.put_bytes(b"", "s3://acts/ready")
        yield
    finally:
        server.stop()


def s3_reading(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with seaweed(folder / "seaweed"):
        url = "s3://acts/dataset"
        manifest = made_up_dataset(url, arguments.tokens or ROWS_PER_SHARD * 4, arguments.d_in)
        total = manifest.tokens * arguments.d_in * 2

        def bare(threads: int) -> float:
            started = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                parts = pool.map(
                    lambda item: len(storage.read_range(f"{url}/{item[0].name}", item[1], item[2])), ranges(manifest)
                )
                assert sum(parts) == total
            return time.perf_counter() - started

        bare(4)
        results: dict[str, list[float]] = {"bare": [], "reader": []}
        for _ in range(4):
            results["bare"].append(float(np.mean([bare(4) for _ in range(2)])))
            results["reader"].append(reader_seconds(url, manifest, epochs=2))
        return {
            "d_in": arguments.d_in,
            "bytes": total,
            "bare_MB_per_s": total / np.median(results["bare"]) / 1e6,
            "reader_MB_per_s": total / np.median(results["reader"]) / 1e6,
            "share": float(np.median(results["bare"]) / np.median(results["reader"])),
        }


# memory and mixing


def peak_memory(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each part in a process of its own, whose peak is what the kernel says of it."""
    from components import steps

    tokens = arguments.tokens or 150_000
    if arguments.part is not None:
        root, part, count = arguments.part.split(",")
        plan = gpt2_plan(Path(root), int(count), width=256, layers=2, rows_per_shard=ROWS_PER_GROUP * 4)
        if part == "reading":
            epoch_of(plan)
        else:
            work = plan.extraction(steps.prepare_tokens(plan))
            if part == "extraction":
                extraction.scatter(work, torch.device("cpu"), range(work.chunks))
            else:
                extraction.gather(work, range(work.buckets))
                extraction.commit(work)
        # (ru_maxrss would start from what the process that forked this one had.)
        status = Path("/proc/self/status").read_text()
        return {"peak_MB": int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3}
    peaks: dict[str, list[float]] = {}
    for part in ("extraction", "shuffle", "reading"):
        for count in (tokens, 10 * tokens):
            root = folder / str(count)
            root.mkdir(exist_ok=True)
            steps.prepare_tokens(gpt2_plan(root, count, width=256, layers=2, rows_per_shard=ROWS_PER_GROUP * 4))
            command = [sys.executable, __file__, "memory", "--part", f"{root},{part},{count}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.setdefault(part, []).append(json.loads(done.stdout)["peak_MB"])
    return {
        "tokens": [tokens, 10 * tokens],
        "peak_MB": peaks,
        "ratio": {part: ten / one for part, (one, ten) in peaks.items()},
    }


def epoch_of(plan: Specification) -> None:
    manifest = plan.dataset_manifest()
    assert manifest is not None
    reader = ActivationReader(
        url=plan.dataset_url, manifest=manifest, columns=(plan.hook_point,), batch_size=4_096, seed=0, window_groups=4
    )
    with closing(reader.batches()) as batches:
        for _ in range(manifest.tokens // 4_096):
            next(batches)


def mixing(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """On as much real text as the standard library has, through a small model."""
    from components import steps

    plan = gpt2_plan(folder, arguments.tokens or 1_000_000, width=64, layers=2, rows_per_shard=ROWS_PER_SHARD)
    manifest = steps.extract(plan)
    measured = check.mixing(plan.dataset_url, manifest)
    return {"tokens": manifest.tokens, "documents": manifest.documents, **measured.model_dump(), "share": measured.share}


if __name__ == "__main__":
    main()
