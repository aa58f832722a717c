"""Image corpora: image files -> sequences of patches in Parquet, split by image, as `components.corpus.tokens` does for text.

`<root>/tokens/<name>-<digest>/` has the same files and the same manifest: one row of a shard is one image with its
`documents` (the image's id), `positions` (patch index) and `tokens` (-1, or the token ids of a prompt), and `images`, the
bytes of the file as it was. `documents.parquet` is the way from an id back to the file.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components import storage
from components.corpus.files import ListedFile
from components.corpus.manifest import (
    SCHEMA_VERSION,
    SPLITS,
    Split,
    TokenManifest,
    TokenShard,
    TokenSplit,
    commit,
    read_token_manifest,
)
from components.corpus.packing import SPECIAL
from components.corpus.settings import CorpusSettings
from components.settings import UserError

_SHARD_BYTES = 64 << 20
_SHARD_IMAGES = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageLayout:
    """What the corpus needs of a model: how every image's sequence looks, arrays `[length]`; `identity` names the
    processor that makes the pixels and the prompt."""

    identity: str
    tokens: np.ndarray
    counted: np.ndarray
    """False for CLS, registers, BOS and whatever else is the same for every image."""
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def prepare_images(
    settings: CorpusSettings,
    files: Sequence[ListedFile],
    layout: ImageLayout,
    seed: int,
    url: str,
    digest: str,
    identity: dict[str, Any],
) -> TokenManifest:
    """Write the image dataset at `url` unless it is there, and return its manifest.

    Images are read in a hashed order; copies of an image and files that are no readable image are left out. Memory: a
    shard of encoded images per split. Raises a UserError when a split ends up with no images.
    """
    manifest = read_token_manifest(url)
    if manifest is not None:
        return manifest
    writers = {
        split: _SplitWriter(split, url, layout, budget)
        for split, budget in zip(SPLITS, (settings.train_tokens, settings.held_out_tokens), strict=True)
    }
    seen: set[bytes] = set()
    unreadable: list[str] = []
    rows: list[tuple[Any, ...]] = []
    for name, content in _read_images(settings, files, seed):
        size = _size(content)
        if size is None:
            unreadable.append(name)
            continue
        fingerprint = sha256(content).digest()
        split = split_of_bytes(content, settings.held_out_fraction)
        if fingerprint not in seen and not writers[split].full:
            seen.add(fingerprint)
            writers[split].add(len(rows), content)
            rows.append((len(rows), name, fingerprint.hex(), split, *size, int(layout.counted.sum())))
        if all(writer.full for writer in writers.values()):
            break
    if unreadable:
        logger.warning("corpus.paths: left out %d that cannot be read as images, such as %s", len(unreadable), unreadable[0])
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, entry in splits.items():
        if entry.tokens == 0:
            raise UserError(
                f"corpus: no image is left for the {split} split out of {len(rows)}; use a larger corpus or another "
                f"corpus.held_out_fraction than {settings.held_out_fraction}"
            )
    with storage.whole_file(storage.join(url, "documents.parquet")) as path:
        columns = [pa.array(column) for column in zip(*rows, strict=True)]
        pq.write_table(pa.table(columns, schema=_DOCUMENT_SCHEMA), path, compression="zstd")
    storage.sweep(url)
    made = TokenManifest(
        schema_version=SCHEMA_VERSION,
        digest=digest,
        identity=identity,
        context_length=len(layout),
        documents=len(rows),
        unreadable=len(unreadable),
        splits=splits,
    )
    return commit(url, made)


def split_of_bytes(content: bytes, held_out_fraction: float) -> Split:
    """`"held_out"` or `"train"`, from the image's bytes alone, as `documents.split_of` from a text."""
    value = int.from_bytes(blake2b(content, digest_size=8).digest(), "big")
    return "held_out" if value < held_out_fraction * 2.0**64 else "train"


class _SplitWriter:
    """Shards of one split, each put in one piece; full when its budget of counted patches is spent."""

    def __init__(self, split: Split, url: str, layout: ImageLayout, budget: int) -> None:
        self.split, self.url, self.layout, self.budget = split, url, layout, budget
        self.shards: list[TokenShard] = []
        self.tokens = self.sequences = 0
        self._documents: list[np.ndarray] = []
        self._images: list[bytes] = []

    @property
    def full(self) -> bool:
        return self.tokens >= self.budget

    def add(self, document: int, content: bytes) -> None:
        # The last image is cut where the budget ends, as a text is.
        counted = self.layout.counted & (np.cumsum(self.layout.counted) <= self.budget - self.tokens)
        self._documents.append(np.where(counted, document, SPECIAL))
        self._images.append(content)
        self.tokens += int(counted.sum())
        self.sequences += 1
        if len(self._images) == _SHARD_IMAGES or sum(map(len, self._images)) >= _SHARD_BYTES:
            self._write()

    def close(self) -> TokenSplit:
        if self._images:
            self._write()
        return TokenSplit(tokens=self.tokens, sequences=self.sequences, documents=self.sequences, shards=tuple(self.shards))

    def _write(self) -> None:
        name, count, length = f"{self.split}-{len(self.shards):05d}.parquet", len(self._images), len(self.layout)

        def repeated(values: np.ndarray) -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(np.tile(values.astype(np.int32), count), length)

        columns = {
            "tokens": repeated(self.layout.tokens),
            "documents": pa.FixedSizeListArray.from_arrays(np.concatenate(self._documents).astype(np.int64), length),
            "positions": repeated(self.layout.positions),
            "images": pa.array(self._images, pa.large_binary()),
        }
        with storage.whole_file(storage.join(self.url, name)) as path:
            # Image files are compressed already.
            pq.write_table(pa.table(columns), path, compression={"images": "none"} | dict.fromkeys(_PATCH_COLUMNS, "zstd"))
            size, checksum = path.stat().st_size, storage.file_sha256(path)
        self.shards.append(TokenShard(name=name, sequences=count, bytes=size, sha256=checksum))
        self._documents, self._images = [], []


_PATCH_COLUMNS = tuple(f"{name}.list.element" for name in ("tokens", "documents", "positions"))
_DOCUMENT_SCHEMA = pa.schema(
    {
        "document": pa.int64(),
        "name": pa.string(),
        "sha256": pa.string(),
        "split": pa.string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "tokens": pa.int64(),
    }
)


def _read_images(settings: CorpusSettings, files: Sequence[ListedFile], seed: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every image, files in an order that depends on `seed` and their names alone."""
    for file in sorted(files, key=lambda file: blake2b(f"{seed}:{file.url}".encode(), digest_size=8).digest()):
        file.require_unchanged("corpus.paths")
        if file.url.lower().endswith(".parquet"):
            yield from _read_parquet(file.url, settings.image_column)
        else:
            yield file.url, storage.read_bytes(file.url)


def _read_parquet(url: str, column: str) -> Iterator[tuple[str, bytes]]:
    """The images of a Parquet file: a binary column, or the struct with `bytes` that Hugging Face datasets writes."""
    filesystem, path = storage.resolve(url)
    file = pq.ParquetFile(path, filesystem=filesystem)
    if column not in file.schema_arrow.names:
        raise UserError(
            f"corpus.image_column: '{column}' is not a column of {url}; it has {', '.join(file.schema_arrow.names)}"
        )
    number = 0
    for batch in file.iter_batches(batch_size=64, columns=[column]):
        for value in batch.column(0).to_pylist():
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise UserError(f"corpus.image_column: '{column}' of {url} holds no image bytes in row {number}")
            yield f"{url}:{number}", content
            number += 1


def _size(content: bytes) -> tuple[int, int] | None:
    """Width and height in pixels of an image that decodes to its end, else None."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
