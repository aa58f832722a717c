"""Image corpora: image files -> sequences of patches in Parquet, split by image, as `components.corpus.tokens` does for text.

`<root>/tokens/<name>-<digest>/` has the same files and the same manifest: one row of a shard is one image with its
`documents` (the image's id), `positions` (patch index) and `tokens` (-1, or the token ids of a prompt), and `images`, the
bytes of the file as it was. `documents.parquet` is the way from an id back to the file.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components import storage
from components.corpus.documents import split_of
from components.corpus.listing import ListedFile
from components.corpus.manifest import SCHEMA_VERSION, SPLITS, Split, TokenManifest, TokenSplit, commit, read_token_manifest
from components.corpus.packing import SPECIAL
from components.corpus.settings import CorpusSettings
from components.corpus.shards import DocumentTable, ShardWriter, require_tokens
from components.settings import Record, UserError

_SHARD_BYTES = 64 << 20
_SHARD_IMAGES = 4096

logger = logging.getLogger(__name__)


class ImageLayout(Record):
    """What the corpus needs of a model: how every image's sequence looks; `identity` names the processor that makes the
    pixels and the prompt."""

    identity: str
    tokens: tuple[int, ...]
    counted: tuple[bool, ...]
    """False for CLS, registers, BOS and whatever else is the same for every image."""
    positions: tuple[int, ...]
    places: tuple[int, ...] = ()
    """Where in the sequence the image stands: its patches row by row, or the tokens that it becomes."""
    grid: tuple[int, int] | None = None
    """Rows and columns of `places` on the picture; None where they are no parts of it (latents of a resampler)."""

    @property
    def of_text(self) -> bool:
        """Whether there are tokens of a prompt beside the image."""
        return self.tokens[0] >= 0

    def __len__(self) -> int:
        return len(self.tokens)

    def patch(self, place: int) -> tuple[int, int] | None:
        """Row and column on the picture of a place in the sequence, from 0; None for one that is no part of the picture."""
        if self.grid is None or place not in self.places:
            return None
        row, column = divmod(self.places.index(place), self.grid[1])
        return row, column


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
    with DocumentTable(url, _DOCUMENT_SCHEMA) as table:
        for name, content in _read_images(settings, files, seed):
            size = size_of(content)
            if size is None:
                unreadable.append(name)
                continue
            fingerprint = sha256(content).digest()
            split = split_of(content, settings.held_out_fraction)
            if fingerprint not in seen and not writers[split].full:
                writers[split].add(len(seen), content)
                table.add(len(seen), name, fingerprint.hex(), split, *size, sum(layout.counted))
                seen.add(fingerprint)
            if all(writer.full for writer in writers.values()):
                break
    if unreadable:
        logger.warning("corpus.paths: left out %d that cannot be read as images, such as %s", len(unreadable), unreadable[0])
    splits = {split: writer.close() for split, writer in writers.items()}
    require_tokens(splits, "image", len(seen), settings.held_out_fraction)
    storage.sweep(url)
    made = TokenManifest(
        schema_version=SCHEMA_VERSION,
        digest=digest,
        identity=identity,
        context_length=len(layout),
        documents=len(seen),
        unreadable=len(unreadable),
        splits=splits,
    )
    return commit(url, made)


class _SplitWriter:
    """Shards of one split; full when its budget of counted patches is spent."""

    def __init__(self, split: Split, url: str, layout: ImageLayout, budget: int) -> None:
        self.layout, self.budget = layout, budget
        self.tokens = self.sequences = 0
        self._counted = np.array(layout.counted)
        self._shards = ShardWriter(split, url)
        self._documents: list[np.ndarray] = []
        self._images: list[bytes] = []

    @property
    def full(self) -> bool:
        return self.tokens >= self.budget

    def add(self, document: int, content: bytes) -> None:
        # The last image is cut where the budget ends, as a text is.
        counted = self._counted & (np.cumsum(self._counted) <= self.budget - self.tokens)
        self._documents.append(np.where(counted, document, SPECIAL))
        self._images.append(content)
        self.tokens += int(counted.sum())
        self.sequences += 1
        if len(self._images) == _SHARD_IMAGES or sum(map(len, self._images)) >= _SHARD_BYTES:
            self._write()

    def close(self) -> TokenSplit:
        if self._images:
            self._write()
        made = tuple(self._shards.made)
        return TokenSplit(tokens=self.tokens, sequences=self.sequences, documents=self.sequences, shards=made)

    def _write(self) -> None:
        tokens, positions = (np.tile(row, (len(self._images), 1)) for row in (self.layout.tokens, self.layout.positions))
        self._shards.write(tokens, np.stack(self._documents), positions, images=pa.array(self._images, pa.large_binary()))
        self._documents, self._images = [], []


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


def size_of(content: bytes) -> tuple[int, int] | None:
    """Width and height in pixels of an image that decodes to its end, else None."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
