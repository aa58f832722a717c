"""Token datasets: documents -> fixed-length token sequences in Parquet, split by document.

`<root>/tokens/<name>-<digest>/` holds `train-00000.parquet` ..., `held_out-00000.parquet` ... (one row is one sequence),
`documents.parquet` (one row is one document: the way from an id in any dataset back to its source) and, put last,
`manifest.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components import storage
from components.corpus.documents import Document, corpus_identity, read_documents, split_of
from components.corpus.settings import CorpusSettings
from components.settings import UserError, digest

SCHEMA_VERSION = 1
SPLITS = ("train", "held_out")
SPECIAL = -1
"""Document id of a BOS token or of a separator between documents: attended to, never counted."""
PADDING = -2
"""Document id of padding: neither attended to nor counted."""
_SEQUENCES_PER_SHARD = 4096
_DOCUMENTS_PER_BATCH = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What the corpus needs of a tokenizer; `identity` names its content."""

    identity: str
    encode: Callable[[list[str]], list[list[int]]]
    bos: int
    separator: int


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


def token_identity(settings: CorpusSettings, tokenizer_identity: str, seed: int) -> dict[str, Any]:
    """Everything that decides the bytes of a token dataset."""
    shape = settings.model_dump(
        include={
            "held_out_fraction", "context_length", "packing", "prepend_bos", "train_tokens", "held_out_tokens"
        }
    )  # fmt: skip
    return {
        "kind": "tokens",
        "schema_version": SCHEMA_VERSION,
        "corpus": corpus_identity(settings),
        "tokenizer": tokenizer_identity,
        "seed": seed,
        **shape,
    }


def prepare_tokens(settings: CorpusSettings, encoder: Encoder, seed: int, url: str) -> dict[str, Any]:
    """Write the token dataset at `url` unless it is there, and return its manifest.

    Memory is bounded by one shard of sequences per split.
    Raises a UserError when a split ends up with no tokens.
    """
    manifest = storage.read_json_if_present(storage.join(url, "manifest.json"))
    if manifest is not None:
        return manifest
    identity = token_identity(settings, encoder.identity, seed)
    writers = {split: _SplitWriter(split, url) for split in SPLITS}
    with storage.whole_file(storage.join(url, "documents.parquet")) as table:
        documents = _write_tokens(settings, encoder, seed, writers, table)
    splits = {split: writer.close() for split, writer in writers.items()}
    storage.sweep(url)
    for split, entry in splits.items():
        if entry["tokens"] == 0:
            raise UserError(
                f"corpus: no document is left for the {split} split out of {documents}; use a larger corpus or another "
                f"corpus.held_out_fraction than {settings.held_out_fraction}"
            )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "digest": digest(identity),
        "identity": identity,
        "context_length": settings.context_length,
        "documents": documents,
        "splits": splits,
    }
    storage.put_json_once(manifest, storage.join(url, "manifest.json"))
    return storage.read_json(storage.join(url, "manifest.json"))


def read_sequences(url: str, manifest: dict[str, Any], split: str, start: int, stop: int) -> Sequences:
    """Sequences `start` to `stop` (exclusive, cut at the end) of a split; at most two shards are held in memory."""
    blocks, first = [], 0
    for shard in manifest["splits"][split]["shards"]:
        low, high = max(start - first, 0), min(stop - first, shard["sequences"])
        if low < high:
            blocks.append(_read_shard(storage.join(url, shard["name"]))[low:high])
        first += shard["sequences"]
    return _concatenate(blocks)


def _write_tokens(settings: CorpusSettings, encoder: Encoder, seed: int, writers: dict[str, _SplitWriter], table: Path) -> int:
    budgets = {"train": settings.train_tokens, "held_out": settings.held_out_tokens}
    packers = {split: _Packer(settings, encoder) for split in SPLITS}
    seen: set[bytes] = set()
    number = 0
    with pq.ParquetWriter(table, _DOCUMENT_SCHEMA, compression="zstd") as documents:
        for batch in _batches(read_documents(settings, seed), _DOCUMENTS_PER_BATCH):
            rows = []
            for document, tokens in zip(batch, encoder.encode([d.text for d in batch]), strict=True):
                split = split_of(document.text, settings.held_out_fraction)
                fingerprint = bytes.fromhex(document.sha256)
                if not tokens or fingerprint in seen or packers[split].counted >= budgets[split]:
                    continue
                seen.add(fingerprint)
                sequences = packers[split].add(number, tokens[: budgets[split] - packers[split].counted])
                writers[split].add(sequences)
                rows.append((number, document.name, document.sha256, split, len(document.text), len(tokens)))
                number += 1
            if rows:
                columns = [pa.array(column) for column in zip(*rows, strict=True)]
                documents.write_table(pa.table(columns, schema=_DOCUMENT_SCHEMA))
            if all(packers[split].counted >= budgets[split] for split in SPLITS):
                break
    for split in SPLITS:
        writers[split].add(packers[split].finish())
        logger.info("%s: %s tokens", split, f"{packers[split].counted:,}")
    return number


class _Packer:
    """Documents in, whole sequences out; keeps less than one sequence between calls."""

    def __init__(self, settings: CorpusSettings, encoder: Encoder) -> None:
        self.crossing = settings.packing == "crossing"
        self.bos = [encoder.bos] if settings.prepend_bos else []
        self.separator = encoder.separator
        self.length = settings.context_length - len(self.bos)
        self.counted = 0
        self._rest = np.empty((3, 0), dtype=np.int64)  # rows: token, document, position

    def add(self, document: int, tokens: list[int]) -> np.ndarray:
        """`[n, 3, context_length]` of the sequences that this document completes."""
        self.counted += len(tokens)
        body = np.stack([np.array(tokens), np.full(len(tokens), document), np.arange(len(tokens))])
        if self.crossing:
            mark = np.array([[self.separator], [SPECIAL], [0]])
            stream = np.concatenate([self._rest, body, mark], axis=1)
        else:
            stream = self._padded(body)
        full = stream.shape[1] // self.length
        self._rest = stream[:, full * self.length :]
        return self._framed(stream[:, : full * self.length])

    def finish(self) -> np.ndarray:
        """The last, padded sequence, if anything is left."""
        return self._framed(self._padded(self._rest)) if (self._rest[1] >= 0).any() else self._framed(self._rest[:, :0])

    def _padded(self, stream: np.ndarray) -> np.ndarray:
        missing = -stream.shape[1] % self.length
        pad = np.array([[self.separator], [PADDING], [0]]).repeat(missing, axis=1)
        return np.concatenate([stream, pad], axis=1)

    def _framed(self, stream: np.ndarray) -> np.ndarray:
        rows = stream.reshape(3, -1, self.length).transpose(1, 0, 2)
        bos = np.array([self.bos, [SPECIAL] * len(self.bos), [0] * len(self.bos)]).astype(np.int64)
        return np.concatenate([np.broadcast_to(bos, (len(rows), *bos.shape)), rows], axis=2)


class _SplitWriter:
    """Shards of one split, each put in one piece."""

    def __init__(self, split: str, url: str) -> None:
        self.split, self.url = split, url
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0
        self.documents: set[int] = set()
        self._held: list[np.ndarray] = []

    def add(self, sequences: np.ndarray) -> None:
        if len(sequences):
            self._held.append(sequences)
        while sum(map(len, self._held)) >= _SEQUENCES_PER_SHARD:
            joined = np.concatenate(self._held)
            self._write(joined[:_SEQUENCES_PER_SHARD])
            self._held = [joined[_SEQUENCES_PER_SHARD:]]

    def close(self) -> dict[str, Any]:
        rest = [block for block in self._held if len(block)]
        if rest:
            self._write(np.concatenate(rest))
        sequences = sum(shard["sequences"] for shard in self.shards)
        return {
            "tokens": self.tokens, "sequences": sequences, "documents": len(self.documents), "shards": self.shards
        }  # fmt: skip

    def _write(self, sequences: np.ndarray) -> None:
        name = f"{self.split}-{len(self.shards):05d}.parquet"
        length = sequences.shape[2]
        columns = {
            "tokens": pa.FixedSizeListArray.from_arrays(sequences[:, 0].astype(np.int32).ravel(), length),
            "documents": pa.FixedSizeListArray.from_arrays(sequences[:, 1].astype(np.int64).ravel(), length),
            "positions": pa.FixedSizeListArray.from_arrays(sequences[:, 2].astype(np.int32).ravel(), length),
        }
        with storage.whole_file(storage.join(self.url, name)) as path:
            pq.write_table(pa.table(columns), path, compression="zstd")
            size, sha256 = path.stat().st_size, storage.file_sha256(path)
        self.shards.append({"name": name, "sequences": len(sequences), "bytes": size, "sha256": sha256})
        counted = sequences[:, 1] >= 0
        self.tokens += int(counted.sum())
        self.documents.update(np.unique(sequences[:, 1][counted]).tolist())


_DOCUMENT_SCHEMA = pa.schema(
    {
        "document": pa.int64(),
        "name": pa.string(),
        "sha256": pa.string(),
        "split": pa.string(),
        "characters": pa.int64(),
        "tokens": pa.int64(),
    }
)


def _batches(documents: Iterator[Document], count: int) -> Iterator[list[Document]]:
    while batch := list(islice(documents, count)):
        yield batch


@lru_cache(maxsize=2)
def _read_shard(url: str) -> Sequences:
    filesystem, path = storage.resolve(url)
    table = pq.read_table(path, filesystem=filesystem).combine_chunks()

    def column(name: str) -> np.ndarray:
        lists = table[name].chunk(0)
        return lists.flatten().to_numpy().reshape(len(lists), -1)

    images = tuple(table["images"].to_pylist()) if "images" in table.column_names else None
    return Sequences(tokens=column("tokens"), documents=column("documents"), positions=column("positions"), images=images)


def _concatenate(blocks: list[Sequences]) -> Sequences:
    if len(blocks) == 1:
        return blocks[0]
    return Sequences(
        tokens=np.concatenate([block.tokens for block in blocks]),
        documents=np.concatenate([block.documents for block in blocks]),
        positions=np.concatenate([block.positions for block in blocks]),
        images=None if blocks[0].images is None else tuple(image for block in blocks for image in block.images or ()),
    )
