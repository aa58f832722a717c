"""`sae data check`: are the bytes what was written, is every token there once, and how well are documents mixed?"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components import storage
from components.activations.dataset.manifest import Manifest, Shard, manifest_url
from components.activations.dataset.reader import ActivationReader
from components.activations.dataset.shard import describe_columns, describe_shard_file
from components.activations.dataset.shuffle import bucket_of
from components.activations.dataset.values import DamagedDatasetError, Values
from components.progress import progress
from components.settings import Settings

logger = logging.getLogger(__name__)

_MOST_BATCHES = 500


class Mixing(Settings):
    """How well the documents are mixed in the batches that the reader gives."""

    batch_size: int
    batches: int
    """How many were looked at."""
    distinct_documents: float
    """Mean count of different documents in a batch."""
    ideal: float
    """Its expectation for a uniformly random permutation of all tokens."""
    autocorrelation: float
    """Of the ids of the documents of neighbouring rows; 0 where the order says nothing."""
    autocorrelation_noise: float
    """The standard deviation that it has by chance, `1 / sqrt(rows)`."""

    @property
    def share(self) -> float:
        return self.distinct_documents / self.ideal


def problems(url: str, manifest: Manifest) -> Iterator[str]:
    """One sentence for each thing that is wrong with a dataset, naming the object. Memory: one shard, and a number per
    document.

    Every file is read once, compared with its checksum, and described anew as extraction described it: places of values,
    Arrow schema, rows, sums. What the manifest says of them must be what comes out. (The reader compares values only: a
    flipped byte in a Parquet header is found here and not there.) Which shard a token is in is a hash of it: a dataset
    whose shards each hold no token twice, and no token of another shard, holds no token twice.
    """
    values = Values(url, manifest)
    sums: list[dict[str, Any]] = []
    counted, documents_seen = 0, np.empty(0, dtype=np.int64)
    with progress(logger, "check", len(manifest.shards), "shards") as advance:
        for number, shard in enumerate(manifest.shards):
            damage = _damage(url, shard, values, sums)
            yield from damage
            if not damage:
                documents, positions = values.tokens(shard)
                counted += len(documents)
                documents_seen = np.union1d(documents_seen, documents)
                if (bucket_of(documents, positions, len(manifest.shards), manifest.seed) != number).any():
                    yield f"{storage.join(url, shard.name)} holds tokens of another shard"
                if len(np.unique(documents << 32 | positions)) != len(documents):
                    yield f"{storage.join(url, shard.name)} holds a token twice"
            advance(1, "")
    place = manifest_url(url)
    if counted != manifest.tokens:
        yield f"{place} says {manifest.tokens} tokens; {counted} were found in whole shards"
    if len(sums) != len(manifest.shards):
        return
    if len(documents_seen) != manifest.documents:
        yield f"{place} says {manifest.documents} documents; there are {len(documents_seen)}"
    for said, found in zip(manifest.columns, describe_columns(manifest.layout, sums, manifest.tokens), strict=True):
        for name in ("mean", "mean_squared_norm", "median_norm"):
            if not np.allclose(getattr(said, name), getattr(found, name), rtol=1e-9, atol=1e-12):
                yield f"{place}: {name} of {said.hook_point} is not that of the stored values"


def mixing(url: str, manifest: Manifest, batch_size: int = 4096, seed: int = 0) -> Mixing:
    """How well documents are mixed in batches of the first epoch. Memory: one number per document."""
    batch_size = min(batch_size, manifest.tokens)
    reader = ActivationReader(url=url, manifest=manifest, columns=("document",), batch_size=batch_size, seed=seed)
    count = min(manifest.tokens // batch_size, _MOST_BATCHES)
    with closing(reader.batches()) as batches:
        seen = [next(batches)["document"].numpy().copy() for _ in range(count)]
    rows = np.concatenate(seen).astype(np.float64)
    deviations = rows - rows.mean()
    variance = float(np.square(deviations).sum())
    return Mixing(
        batch_size=batch_size,
        batches=count,
        distinct_documents=float(np.mean([len(np.unique(batch)) for batch in seen])),
        ideal=expected_distinct(_document_sizes(url, manifest), batch_size),
        autocorrelation=float((deviations[:-1] * deviations[1:]).sum()) / variance if variance else 0.0,
        autocorrelation_noise=1.0 / math.sqrt(len(rows)),
    )


def expected_distinct(sizes: np.ndarray, draws: int) -> float:
    """Expected count of different documents among `draws` tokens drawn without replacement, given documents' sizes.

    The sum over documents of one minus the hypergeometric chance of drawing none of its tokens.
    """
    total = int(sizes.sum())
    expected = 0.0
    for size, documents in zip(*np.unique(sizes[sizes > 0], return_counts=True), strict=True):
        missed = 0.0
        if total - size >= draws:
            lost = _log_choose(total - int(size), draws) - _log_choose(total, draws)
            missed = math.exp(lost)
        expected += int(documents) * (1.0 - missed)
    return expected


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _document_sizes(url: str, manifest: Manifest) -> np.ndarray:
    """Tokens of each document, by id."""
    values = Values(url, manifest)
    sizes = np.zeros(0, dtype=np.int64)
    for shard in manifest.shards:
        counts = np.bincount(values.tokens(shard)[0])
        if len(counts) > len(sizes):
            sizes = np.pad(sizes, (0, len(counts) - len(sizes)))
        sizes[: len(counts)] += counts
    return sizes


def _damage(url: str, shard: Shard, values: Values, sums: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a shard's file; the sums of a whole one are added."""
    place, layout = storage.join(url, shard.name), values.manifest.layout
    try:
        size = storage.size(place)
    except FileNotFoundError:
        return [f"{place} is missing"]
    if size != shard.bytes:
        return [f"{place} has {size} bytes and not {shard.bytes}"]
    with storage.local_copy(place) as path:
        found = storage.file_sha256(path)
        if found == shard.sha256:
            try:
                described = describe_shard_file(path, layout, shard.name)
                schema = pq.read_schema(path)
            except (OSError, KeyError, ValueError, pa.ArrowException) as error:
                return [f"{place} is not a shard with the columns that the manifest says: {error}"]
            if not schema.equals(layout.arrow, check_metadata=True):
                return [f"{place} has other columns than the manifest says: {', '.join(schema.names)}"]
            if described.shard != shard:
                return [f"{manifest_url(url)}: rows or places of values of {shard.name} are not those of the file"]
            sums.append(described.sums)
            return []
    damaged = []
    for column, groups in shard.groups.items():
        for group in range(len(groups)):
            try:
                values.read(shard, group, column)
            except DamagedDatasetError as error:
                damaged.append(str(error).split("; `sae")[0])
    return damaged or [f"{place} is damaged outside of its values: its sha256 is {found} and not {shard.sha256}"]
