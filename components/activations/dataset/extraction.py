"""Extraction: token sequences -> language model -> a shuffled activation dataset.

The work is a list of chunks (forward pass, scatter) and then a list of buckets (shuffle, write a shard). Each item
writes one file whole, the same rows whoever does it; what is already there is not done again. So any number of workers
may share the list, and a killed extraction continues where it was.
"""

from __future__ import annotations

import logging
import platform
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from components import storage
from components.activations.dataset.forward import Chunk, resolve_exclusion, run_chunk
from components.activations.dataset.job import Extraction, chunk_sequences
from components.activations.dataset.manifest import Manifest, Shard, manifest_url, read_manifest
from components.activations.dataset.shard import LARGEST_PAGE, Written, describe_columns, describe_shard_file, write_shard_file
from components.activations.dataset.shuffle import Scattered, write_scattered
from components.activations.exclusion import NOTHING, Exclusion, sinks_warning
from components.activations.settings import ExcludeSettings
from components.language_model.loading import kept_model
from components.progress import progress
from components.records import read_record
from components.settings import UserError

logger = logging.getLogger(__name__)

_CHUNKS_AT_ONCE = 2  # being written while the language model runs on the next one


def extract(work: Extraction, device: torch.device) -> Manifest:
    """Do what is left of the work and commit the dataset. Memory: a few chunks or `shuffle_workers` shards.

    Raises a UserError when an activation does not fit the number format on disk, or the data does not fit the disk.
    """
    # Two processes on one machine take turns; the second finds the work done. Under s3:// they share it.
    with storage.exclusive(work.url):
        manifest = finish(work)
        if manifest is None:
            prepare(work)
            scatter(work, device, range(work.chunks))
            gather(work, range(work.buckets))
            manifest = commit(work)
    return manifest


def finish(work: Extraction) -> Manifest | None:
    """The manifest of the dataset if it is committed, with what is no longer needed cleared away; else None."""
    manifest = read_manifest(work.url)
    if manifest is not None:
        storage.delete(storage.join(work.url, "scatter"))
        storage.sweep(work.url)
    return manifest


def prepare(work: Extraction) -> None:
    """Raise a UserError for what would stop the work later: a page that is too large, a disk that is too small."""
    for name, width in work.layout.widths.items():
        largest = LARGEST_PAGE // work.layout.column_bytes[name]
        if work.settings.rows_per_group > largest:
            raise UserError(
                f"activations.rows_per_group: {work.settings.rows_per_group} rows of {name} ({width} wide) are more than "
                f"a Parquet page holds; at most {largest} are accepted"
            )
    free = storage.free_bytes(work.url)
    if free is None:
        return
    # Scattered chunks and finished shards stand side by side until the commit.
    stored = sum(path.stat().st_size for path in storage.local_path(work.url).rglob("*") if path.is_file())
    needed = 2 * work.split.tokens * work.layout.row_bytes + work.shuffle.largest - stored
    if needed > free:
        raise UserError(
            f"storage.root: extraction needs {needed / 1e9:,.1f} GB more on the disk of '{work.url}', which has "
            f"{free / 1e9:,.1f} GB left; half of it is freed at the end. Free some, or lower corpus.train_tokens"
        )


def scatter(work: Extraction, device: torch.device, chunks: Sequence[int]) -> None:
    """Run the language model on those of these chunks that are not there yet, and put each one scattered over buckets."""
    if _overtaken(work):
        return
    done = set(storage.list_names(work.scatter_url))
    plan = work.shuffle
    merged = [(plan.width**level, level) for level in range(plan.levels + 1)]
    missing = [chunk for chunk in chunks if not any(work.merged_name(level, chunk // size) in done for size, level in merged)]
    if not missing:
        return
    if len(missing) < len(chunks):
        logger.info("extract: continuing, %d of %d chunks are there", len(chunks) - len(missing), len(chunks))
    model = kept_model(work.source, device)
    exclusion = _exclusion(work, model, device)
    size = work.settings.sequences_per_chunk
    total = sum(min(size, work.split.sequences - chunk * size) for chunk in missing) * work.token_manifest.context_length
    with (
        progress(logger, "extract", total, "tokens") as advance,
        ThreadPoolExecutor(max_workers=_CHUNKS_AT_ONCE) as writers,
    ):
        pending: list[Future[None]] = []
        for chunk in _apart(work, missing, _chunks_per_token_shard(work)):
            if _overtaken(work):
                break
            if _shared(work) and storage.exists(work.chunk_url(chunk)):
                continue  # another worker has done it meanwhile
            sequences = chunk_sequences(work, chunk)
            scattered = run_chunk(work.source, model, work.points, sequences, work.settings.dtype, device, exclusion)
            while len(pending) >= _CHUNKS_AT_ONCE:
                pending.pop(0).result()
            # The file is written and uploaded while the model runs on the next chunk.
            pending.append(writers.submit(write_chunk, work, chunk, scattered))
            advance(sequences.tokens.size, "")
        for future in pending:
            future.result()


def _exclusion(work: Extraction, model: nn.Module, device: torch.device) -> Exclusion:
    """The same for every worker, whatever its machine rounds: the first one's is put beside the chunks."""
    if work.settings.exclude == ExcludeSettings():
        return NOTHING
    found = read_record(Exclusion, work.exclusion_url, f"delete {work.scatter_url}")
    if found is None:
        made = resolve_exclusion(
            work.settings.exclude, work.source, model, work.points, work.token_url, work.token_manifest, device
        )
        storage.put_json_once(made.model_dump(mode="json"), work.exclusion_url)
        found = read_record(Exclusion, work.exclusion_url, f"delete {work.scatter_url}")
        assert found is not None
    return found


def _shared(work: Extraction) -> bool:
    """Whether workers that know nothing of each other may be on this dataset: a local one is held by a lock."""
    return not storage.is_local(work.url)


def _overtaken(work: Extraction) -> bool:
    """Whether another worker has committed the dataset already, and cleared the chunks away."""
    return _shared(work) and storage.exists(manifest_url(work.url))


def _apart(work: Extraction, items: Iterable[int], together: int = 1) -> list[int]:
    """The items in the order to do them: each worker its own where several may share them, so that they do not meet.

    together: so many neighbours stay so, forwards or backwards.
    """
    items = list(items)
    if not _shared(work):
        return items
    blocks: dict[int, list[int]] = {}
    for item in items:
        blocks.setdefault(item // together, []).append(item)
    order = list(blocks.values())
    random.shuffle(order)
    return [item for block in order for item in block[:: random.choice((1, -1))]]


def _chunks_per_token_shard(work: Extraction) -> int:
    """Chunks that are done one after the other, so that their shard of tokens is read once. Two shards are kept anyway."""
    shards = work.split.shards
    return max(1, shards[0].sequences // work.settings.sequences_per_chunk) if len(shards) > 2 else 1


def write_chunk(work: Extraction, chunk: int, scattered: Chunk) -> None:
    """Scatter a chunk's tokens over the buckets and put the file. In numpy alone: it runs beside the language model."""
    with storage.whole_file(work.chunk_url(chunk)) as path:
        write_scattered(scattered.columns, work.layout, work.buckets, work.seed, path)


def gather(work: Extraction, buckets: Sequence[int]) -> None:
    """Shuffle those of these buckets that are not there yet into their shards."""
    try:
        _gather(work, buckets)
    except FileNotFoundError:
        if not _overtaken(work):
            raise


def _gather(work: Extraction, buckets: Sequence[int]) -> None:
    if _overtaken(work):
        return
    done = set(storage.list_names(work.scatter_url))
    missing = [bucket for bucket in buckets if work.record_name(bucket) not in done]
    if not missing:
        return
    levels = work.shuffle.levels
    files = range(work.shuffle.files(levels))
    if levels:
        with progress(logger, "merge", len(files), "files") as advance:
            for index in random.sample(files, len(files)):  # other workers begin elsewhere
                merge(work, levels, index)
                advance(1, "")
    scattered = Scattered([work.merged_url(levels, index) for index in files], work.buckets, work.layout)
    with (
        progress(logger, "shuffle", len(missing), "shards") as advance,
        ThreadPoolExecutor(max_workers=work.settings.shuffle_workers) as workers,
    ):
        futures = [workers.submit(write_shard, work, bucket, scattered) for bucket in _apart(work, missing)]
        try:
            for future in as_completed(futures):
                future.result()
                advance(1, "")
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def merge(work: Extraction, level: int, index: int) -> None:
    """Merge the files of the level below into this one, unless it is there; they are merged first where they have to be."""
    url, plan = work.merged_url(level, index), work.shuffle
    if level == 0 or storage.exists(url):
        return
    with storage.exclusive(url):
        if storage.exists(url):
            return
        parts = range(index * plan.width, min((index + 1) * plan.width, plan.files(level - 1)))
        try:
            for part in parts:
                merge(work, level - 1, part)
            scattered = Scattered([work.merged_url(level - 1, part) for part in parts], work.buckets, work.layout)
            with storage.scratch(url) as path:
                scattered.merge(path, plan.memory)
                storage.put_file_once(path, url)  # never replaced: another worker may be reading it
        except FileNotFoundError:
            if not storage.exists(url):  # else another worker has merged them meanwhile, and removed them
                raise
        for part in parts:
            storage.delete(work.merged_url(level - 1, part))


def write_shard(work: Extraction, bucket: int, scattered: Scattered) -> None:
    """Shuffle one bucket into its shard, and record its manifest entry and its sums beside the scattered chunks.

    A shard that is there is taken as it is, and never replaced: another worker's may differ in the last bit of a rounding
    (another kind of device), and the manifest must be true of the one that is read.
    """
    if _shared(work) and storage.exists(work.record_url(bucket)):
        return
    name = work.shard_name(bucket)
    url = storage.join(work.url, name)
    if not storage.exists(url):
        records = scattered.read(bucket)
        with storage.scratch(url) as path:
            written = write_shard_file(
                records,
                work.layout,
                seed=work.seed,
                rows_per_group=work.settings.rows_per_group,
                compression=work.settings.compression,
                path=path,
                name=name,
            )
            if storage.put_file_once(path, url):
                _record(work, bucket, written)
                return
    with storage.local_copy(url) as path:
        _record(work, bucket, describe_shard_file(path, work.layout, name))


def _record(work: Extraction, bucket: int, written: Written) -> None:
    storage.put_json({"shard": written.shard.model_dump(), "sums": written.sums}, work.record_url(bucket))


def commit(work: Extraction) -> Manifest:
    """Put the manifest, unless another worker was first; either way, return the one that is there."""
    excluding = work.settings.exclude != ExcludeSettings()
    try:
        records = [storage.read_json(work.record_url(bucket)) for bucket in range(work.buckets)]
        exclusion = Exclusion.model_validate(storage.read_json(work.exclusion_url)) if excluding else NOTHING
    except FileNotFoundError:
        manifest = finish(work)
        if manifest is None:
            raise
        return manifest
    shards = tuple(Shard.model_validate(record["shard"]) for record in records)
    tokens = sum(shard.rows for shard in shards)
    if tokens == 0:
        raise UserError("activations.exclude: it leaves no token; choose fewer positions or token ids, or a higher norms_above")
    if tokens != work.split.tokens and not excluding:
        raise RuntimeError(f"{work.url}: {tokens} rows were written for {work.split.tokens} tokens")
    columns = describe_columns(work.layout, [record["sums"] for record in records], tokens)
    for column in columns:
        if column.mean_squared_norm == 0:
            raise UserError(
                f"activations.hook_points: every activation at {column.hook_point} is zero, and there is nothing to train on; "
                "name another place, or see whether the model's weights are whole"
            )
        warning = sinks_warning(column.hook_point, column.mean_squared_norm, column.median_norm)
        if warning is not None:
            logger.warning("extract: %s", warning)
    manifest = Manifest.sealed(
        identity=work.identity,
        configuration=work.configuration,
        versions=_versions(),
        documents=_documents(work, shards) if excluding else work.split.documents,
        exclusion=exclusion,
        rows_per_group=work.settings.rows_per_group,
        compression=work.settings.compression,
        seed=work.seed,
        shards=shards,
        columns=columns,
    )
    storage.put_json_once(manifest.model_dump(mode="json"), manifest_url(work.url))
    committed = finish(work)
    assert committed is not None
    return committed


def _documents(work: Extraction, shards: Sequence[Shard]) -> int:
    """How many have a token that counts. Memory: a number per document."""
    seen = np.empty(0, dtype=np.int64)
    for shard in shards:
        filesystem, path = storage.resolve(storage.join(work.url, shard.name))
        column = pq.read_table(path, columns=["document"], filesystem=filesystem)["document"]
        seen = np.union1d(seen, column.to_numpy())
    return len(seen)


def _versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "pyarrow": pa.__version__,
    }
