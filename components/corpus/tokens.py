"""Token datasets: documents -> fixed-length token sequences in Parquet, split by document.

`<root>/tokens/<name>-<digest>/` holds `train-00000.parquet` ..., `held_out-00000.parquet` ... (one row is one sequence),
`documents.parquet` (one row is one document: the way from an id in any dataset back to its source) and, put last,
`manifest.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components import storage
from components.corpus.encoder import Encoder
from components.corpus.manifest import (
    REMEDY,
    SCHEMA_VERSION,
    SPLITS,
    SourceEntry,
    SourceSplit,
    Split,
    TokenManifest,
    TokenShard,
    commit,
    read_token_manifest,
)
from components.corpus.packing import PADDING, SPECIAL
from components.corpus.settings import CorpusSettings
from components.corpus.shards import require_tokens
from components.corpus.sources import ListedSource, describe, list_corpus
from components.corpus.tokenization import Tokenization
from components.settings import UserError

__all__ = ["PADDING", "SPECIAL", "Sequences", "joined", "prepare_tokens", "read_pieces", "read_sequences"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """A block of sequences, each array `[n, context_length]`: token ids, document ids, token index in the document."""

    tokens: np.ndarray
    documents: np.ndarray
    positions: np.ndarray
    images: tuple[bytes, ...] | None = None
    """Of an image corpus, the encoded image of each sequence."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Sequences:
        images = None if self.images is None else self.images[rows]
        return Sequences(
            tokens=self.tokens[rows], documents=self.documents[rows], positions=self.positions[rows], images=images
        )


def prepare_tokens(
    settings: CorpusSettings,
    encoder: Encoder,
    seed: int,
    url: str,
    digest: str = "",
    identity: Mapping[str, Any] | None = None,
    sources: Sequence[ListedSource] | None = None,
) -> TokenManifest:
    """Write the token dataset at `url` unless it is there, and return its manifest.

    digest, identity: what names it. sources: what is read, as it was listed when the run was resolved; as it is now where it
    is not given. Raises a UserError when a split ends up with no tokens.
    """
    manifest = read_token_manifest(url)
    if manifest is not None:
        return manifest
    work = Tokenization(settings, encoder, seed, url, list_corpus(settings) if sources is None else sources)
    splits = work.run()
    storage.sweep(url)
    require_tokens(splits, "document", work.documents, settings.held_out_fraction)
    made = TokenManifest(
        schema_version=SCHEMA_VERSION,
        digest=digest,
        identity=dict(identity or {}),
        context_length=settings.context_length,
        documents=work.documents,
        splits=splits,
        sources=_source_entries(settings, work),
    )
    _report(made)
    return commit(url, made)


def read_sequences(url: str, manifest: TokenManifest, split: Split, start: int, stop: int) -> Sequences:
    """Sequences `start` to `stop` (exclusive, cut at the end) of a split; at most two shards are held in memory.

    A UserError that names a shard which is missing or not what was written.
    """
    blocks, first = [], 0
    for shard in manifest.splits[split].shards:
        low, high = max(start - first, 0), min(stop - first, shard.sequences)
        if low < high:
            blocks.append(_read_shard(storage.join(url, shard.name), shard)[low:high])
        first += shard.sequences
    return joined(blocks)


def read_pieces(url: str, manifest: TokenManifest, split: Split, pieces: Sequence[tuple[int, int]]) -> Sequences:
    """Sequences of several ranges one after the other, each as of `read_sequences`."""
    return joined([read_sequences(url, manifest, split, start, stop) for start, stop in pieces])


def _source_entries(settings: CorpusSettings, work: Tokenization) -> tuple[SourceEntry, ...]:
    quotas = work.quotas
    return tuple(
        SourceEntry(
            name=source.name,
            share=quotas.shares[index],
            read_from=tuple(describe(source)),
            ended=quotas.ended[index],
            duplicates_dropped=work.dropped[index],
            splits={
                split: SourceSplit(tokens=quotas.tokens[index][split], documents=quotas.documents[index][split])
                for split in SPLITS
            },
        )
        for index, (_, source) in enumerate(settings.sources)
    )


def _report(manifest: TokenManifest) -> None:
    sources = manifest.sources
    for split, entry in manifest.splits.items():
        shares = ""
        if len(sources) > 1:
            given = [f"{100 * source.splits[split].tokens / entry.tokens:.1f}% {source.name}" for source in sources]
            shares = f" ({', '.join(given)})"
        logger.info("%s: %s tokens of %s documents%s", split, f"{entry.tokens:,}", f"{entry.documents:,}", shares)
    copies, near = (sum(source.duplicates_dropped[kind] for source in sources) for kind in ("exact", "near"))
    if copies or near:
        logger.info("corpus: dropped as duplicates: %s exact, %s near", f"{copies:,}", f"{near:,}")


@lru_cache(maxsize=2)
def _read_shard(url: str, shard: TokenShard) -> Sequences:
    try:
        content = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(f"{url} is missing; {REMEDY}") from error
    if sha256(content).hexdigest() != shard.sha256:
        raise UserError(f"{url} is damaged: it is not what was written; {REMEDY}")
    table = pq.read_table(pa.BufferReader(content)).combine_chunks()
    if len(table) != shard.sequences:
        raise UserError(f"{url} holds {len(table)} sequences, and its manifest says {shard.sequences}; {REMEDY}")

    def column(name: str) -> np.ndarray:
        lists = table[name].chunk(0)
        return lists.flatten().to_numpy().reshape(len(lists), -1)

    images = tuple(table["images"].to_pylist()) if "images" in table.column_names else None
    return Sequences(tokens=column("tokens"), documents=column("documents"), positions=column("positions"), images=images)


def joined(blocks: list[Sequences]) -> Sequences:
    """Blocks one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    return Sequences(
        tokens=np.concatenate([block.tokens for block in blocks]),
        documents=np.concatenate([block.documents for block in blocks]),
        positions=np.concatenate([block.positions for block in blocks]),
        images=None if blocks[0].images is None else tuple(image for block in blocks for image in block.images or ()),
    )
