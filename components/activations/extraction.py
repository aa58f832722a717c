"""Extraction: token sequences -> language model -> a shuffled activation dataset.

The work is a list of chunks (forward pass, scatter) and then a list of buckets (shuffle, write a shard). Each item
writes one file whole, with the same bytes whoever does it; what is already there is not done again. So any number of
workers may share the list, and a killed extraction continues where it was.
"""

from __future__ import annotations

import json
import logging
import platform
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from components import storage
from components.activations.manifest import SCHEMA_VERSION, Column, Manifest, Shard, manifest_url, read_manifest
from components.activations.schema import DTYPES, dataset_schema, rows_from_tensor, tensor_from_rows
from components.activations.settings import ActivationSettings
from components.activations.shuffle import read_bucket, write_scattered
from components.corpus.tokens import Sequences, read_sequences
from components.language_model.hook_points import HookPoint, capture, expand_hook_points
from components.language_model.loading import ModelSource, forward_inputs, load_model
from components.progress import progress
from components.settings import UserError, digest

logger = logging.getLogger(__name__)


def dataset_identity(
    settings: ActivationSettings, source: ModelSource, token_identity: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Everything that decides the bytes of an activation dataset. The device and the batch size are left out: they
    change nothing beyond the last bit of a rounding."""
    return {
        "kind": "activations",
        "schema_version": SCHEMA_VERSION,
        "model": source.identity,
        "tokens": token_identity,
        "seed": seed,
        **settings.model_dump(mode="json", exclude={"sequences_per_chunk"}),
        "hook_points": [str(point) for point in expand_hook_points(settings.hook_points, source, "activations.hook_points")],
    }


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """One dataset's work, cut into chunks and buckets."""

    url: str
    identity: dict[str, Any]
    settings: ActivationSettings
    source: ModelSource
    token_url: str
    token_manifest: dict[str, Any]
    seed: int

    @cached_property
    def split(self) -> dict[str, Any]:
        return self.token_manifest["splits"][self.settings.split]

    @property
    def chunks(self) -> int:
        return -(-self.split["sequences"] // self.settings.sequences_per_chunk)

    @property
    def buckets(self) -> int:
        return max(1, round(self.split["tokens"] / self.settings.rows_per_shard))

    @cached_property
    def points(self) -> list[HookPoint]:
        return expand_hook_points(self.settings.hook_points, self.source, "activations.hook_points")

    @cached_property
    def widths(self) -> dict[HookPoint, int]:
        return self.source.widths(self.points)

    def chunk_url(self, chunk: int) -> str:
        return storage.join(self.url, "scatter", f"chunk-{chunk:06d}.parquet")

    def shard_name(self, bucket: int) -> str:
        return f"shard-{bucket:05d}.parquet"

    def shard_record_url(self, bucket: int) -> str:
        return storage.join(self.url, "scatter", f"shard-{bucket:05d}.json")


def extract(work: Extraction, device: torch.device) -> Manifest:
    """Do what is left of the work and commit the dataset. Memory: two chunks or one shard, whatever the corpus.

    Raises a UserError when an activation does not fit the number format on disk.
    """
    # Two processes on one machine take turns; the second finds the work done. (Workers that share the work call
    # `run_chunk`, `write_chunk` and `write_shard` themselves.)
    with storage.exclusive(work.url):
        manifest = read_manifest(work.url)
        if manifest is None:
            _scatter_all(work, device)
            _gather_all(work)
            manifest = _commit(work)
        storage.delete(storage.join(work.url, "scatter"))
        storage.sweep(work.url)
    return manifest


def _scatter_all(work: Extraction, device: torch.device) -> None:
    done = set(storage.list_names(storage.join(work.url, "scatter")))
    missing = [chunk for chunk in range(work.chunks) if work.chunk_url(chunk).rsplit("/", 1)[-1] not in done]
    if not missing:
        return
    if len(missing) < work.chunks:
        logger.info("extract: continuing, %d of %d chunks are there", work.chunks - len(missing), work.chunks)
    model = load_model(work.source, device)
    total = len(missing) * work.settings.sequences_per_chunk * work.token_manifest["context_length"]
    with (
        progress(logger, "extract", min(total, _all_tokens(work)), "tokens") as advance,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        pending: Future[None] | None = None
        for chunk in missing:
            sequences, columns = run_chunk(work, model, device, chunk)
            if pending is not None:
                pending.result()
            # The file is written while the model runs on the next chunk.
            pending = writer.submit(write_chunk, work, chunk, sequences, columns)
            advance(sequences.tokens.size, "")
        if pending is not None:
            pending.result()


def _all_tokens(work: Extraction) -> int:
    return work.split["sequences"] * work.token_manifest["context_length"]


def run_chunk(
    work: Extraction, model: torch.nn.Module, device: torch.device, chunk: int
) -> tuple[Sequences, dict[HookPoint, Tensor]]:
    """A chunk's sequences, and for each hook point the activations of its counted tokens, `[n, d_in]` on the CPU in the
    number format on disk."""
    start = chunk * work.settings.sequences_per_chunk
    stop = start + work.settings.sequences_per_chunk
    sequences = read_sequences(work.token_url, work.token_manifest, work.settings.split, start, stop)
    parts: dict[HookPoint, list[Tensor]] = {point: [] for point in work.points}
    size = work.source.settings.batch_sequences
    counted = torch.tensor(sequences.documents >= 0, device=device)
    for start, kept in zip(range(0, len(sequences), size), counted.split(size), strict=True):
        inputs = forward_inputs(work.source, sequences[start : start + size], device)
        for point, activation in capture(model, work.points, inputs).items():
            values = activation[kept].to(DTYPES[work.settings.dtype])
            if not torch.isfinite(values).all():
                raise UserError(
                    f"activations.dtype: '{work.settings.dtype}' cannot hold the activations at {point}, which overflow; "
                    "use bfloat16 or float32"
                )
            parts[point].append(values.cpu())
    return sequences, {point: torch.cat(blocks) for point, blocks in parts.items()}


def write_chunk(work: Extraction, chunk: int, sequences: Sequences, columns: dict[HookPoint, Tensor]) -> None:
    """Scatter a chunk's counted tokens over the buckets and put the file.

    Runs beside the language model, so it computes nothing in torch (see the reader for what that would cost).
    """
    counted = sequences.documents >= 0
    first = chunk * work.settings.sequences_per_chunk * sequences.tokens.shape[1]
    rows = (first + np.flatnonzero(counted)).astype(np.int64)
    arrays: list[pa.Array] = [
        pa.array(sequences.documents[counted]),
        pa.array(sequences.positions[counted]),
        pa.array(sequences.tokens[counted]),
    ]
    widths = {}
    for point, activations in columns.items():
        arrays.append(rows_from_tensor(activations))
        widths[str(point)] = activations.shape[1]
    table = pa.Table.from_arrays(arrays, schema=dataset_schema(widths, work.settings.dtype))
    with storage.whole_file(work.chunk_url(chunk)) as path:
        write_scattered(table, rows, work.buckets, work.seed, path)


def _gather_all(work: Extraction) -> None:
    with progress(logger, "shuffle", work.buckets, "shards") as advance:
        for bucket in range(work.buckets):
            if not storage.exists(work.shard_record_url(bucket)):
                write_shard(work, bucket)
            advance(1, "")


def write_shard(work: Extraction, bucket: int) -> None:
    """Shuffle one bucket into its shard, and record the shard's checksum and sums beside the scattered chunks."""
    schema = dataset_schema({str(point): work.widths[point] for point in work.points}, work.settings.dtype)
    chunks = [work.chunk_url(chunk) for chunk in range(work.chunks)]
    table = read_bucket(chunks, bucket, work.seed, schema)
    with storage.whole_file(storage.join(work.url, work.shard_name(bucket))) as path:
        with pq.ParquetWriter(
            path,
            schema,
            compression="none",
            use_dictionary=False,
            write_statistics=["document", "position"],
            data_page_size=1 << 20,
        ) as writer:
            writer.write_table(table, row_group_size=work.settings.rows_per_group)
        written = pq.read_metadata(path).num_rows
        assert written == len(table), f"{path} holds {written} rows of {len(table)}"
        size, sha256 = path.stat().st_size, storage.file_sha256(path)
    sums = {}
    for point in work.points:
        values = tensor_from_rows(table[str(point)], work.settings.dtype).double()
        squares = values.square().sum(dim=1)
        sums[str(point)] = {
            "sum": values.sum(dim=0).tolist(),
            "squares": squares.sum().item(),
            "median_norm": squares.median().sqrt().item() if len(values) else 0.0,
        }
    record = {
        "shard": Shard(name=work.shard_name(bucket), rows=len(table), bytes=size, sha256=sha256).model_dump(),
        "documents": np.unique(table["document"].to_numpy()).tolist(),
        "sums": sums,
    }
    storage.put_bytes(json.dumps(record).encode(), work.shard_record_url(bucket))


def _commit(work: Extraction) -> Manifest:
    """Put the manifest, unless another worker was first; either way, return the one that is there."""
    records = [storage.read_json(work.shard_record_url(bucket)) for bucket in range(work.buckets)]
    shards = tuple(Shard.model_validate(record["shard"]) for record in records)
    tokens = sum(shard.rows for shard in shards)
    assert tokens == work.split["tokens"], f"{tokens} rows were written for {work.split['tokens']} tokens"
    columns = []
    for point in work.points:
        sums = [record["sums"][str(point)] for record in records]
        columns.append(
            Column(
                hook_point=str(point),
                d_in=work.widths[point],
                dtype=work.settings.dtype,
                mean=tuple((np.sum([entry["sum"] for entry in sums], axis=0) / tokens).tolist()),
                mean_squared_norm=sum(entry["squares"] for entry in sums) / tokens,
                median_norm=sums[0]["median_norm"],
            )
        )
    schema = dataset_schema({column.hook_point: column.d_in for column in columns}, work.settings.dtype)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        digest=digest(work.identity),
        identity=work.identity,
        versions=_versions(),
        arrow_schema=tuple(f"{field.name}: {field.type}" for field in schema),
        tokens=tokens,
        documents=len({document for record in records for document in record["documents"]}),
        shards=shards,
        columns=tuple(columns),
    )
    storage.put_json_once(manifest.model_dump(mode="json"), manifest_url(work.url))
    committed = read_manifest(work.url)
    assert committed is not None
    return committed


def _versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "pyarrow": pa.__version__,
    }
