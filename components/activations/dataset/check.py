"""`sae data check`: are the bytes what was written, is every token there once, and how well are documents mixed?"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256

import numpy as np

from components import storage
from components.activations.dataset.manifest import Manifest, Shard, manifest_url
from components.activations.dataset.reader import ActivationReader
from components.activations.dataset.shuffle import bucket_of
from components.activations.dataset.values import DamagedDatasetError, Values
from components.progress import progress
from components.settings import Settings

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 24
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
    """One sentence for each thing that is wrong with a dataset, naming the object. Memory: one shard's documents.

    Every file is read once and compared with its checksum. Which shard a token is in is a hash of it: a dataset whose
    shards each hold no token twice, and no token of another shard, holds no token twice.
    """
    values = Values(url, manifest)
    counted = 0
    with progress(logger, "check", len(manifest.shards), "shards") as advance:
        for number, shard in enumerate(manifest.shards):
            damage = _damage(url, shard, values)
            yield from damage
            if not damage:
                documents, positions = values.tokens(shard)
                counted += len(documents)
                if (bucket_of(documents, positions, len(manifest.shards), manifest.seed) != number).any():
                    yield f"{storage.join(url, shard.name)} holds tokens of another shard"
                if len(np.unique(documents << 32 | positions)) != len(documents):
                    yield f"{storage.join(url, shard.name)} holds a token twice"
            advance(1, "")
    if counted != manifest.tokens:
        yield f"{manifest_url(url)} says {manifest.tokens} tokens; {counted} were found in whole shards"


def strangers(url: str, manifest: Manifest) -> list[str]:
    """Files in the dataset's folder that are no part of it."""
    known = {shard.name for shard in manifest.shards} | {"manifest.json"}
    return [storage.join(url, name) for name in storage.list_names(url) if name not in known]


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


def _damage(url: str, shard: Shard, values: Values) -> list[str]:
    """What is wrong with a shard's bytes."""
    place = storage.join(url, shard.name)
    try:
        size = storage.size(place)
    except FileNotFoundError:
        return [f"{place} is missing"]
    if size != shard.bytes:
        return [f"{place} has {size} bytes and not {shard.bytes}"]
    state = sha256()
    for start in range(0, size, _PIECE_BYTES):
        state.update(storage.read_range(place, start, min(_PIECE_BYTES, size - start)))
    if state.hexdigest() == shard.sha256:
        return []
    found = []
    for column, groups in shard.groups.items():
        for group in range(len(groups)):
            try:
                values.read(shard, group, column)
            except DamagedDatasetError as error:
                found.append(str(error).split("; `sae")[0])
    return found or [f"{place} is damaged outside of its values: its sha256 is {state.hexdigest()} and not {shard.sha256}"]
