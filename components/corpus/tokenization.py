"""One pass over the documents: take turns between sources, drop duplicates, encode, pack, write.

Memory: one batch of documents per source, one shard of sequences per split, and the duplicates' cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from components.corpus.documents import Document
from components.corpus.duplicates import Duplicates, Fingerprint
from components.corpus.encoder import Encoder
from components.corpus.manifest import SPLITS, Split, TokenSplit
from components.corpus.mixture import Quotas
from components.corpus.packing import Packer
from components.corpus.settings import CorpusSettings
from components.corpus.shards import DocumentTable, ShardWriter
from components.corpus.sources import ListedSource, read_documents, weights_to_shares
from components.progress import progress

_SEQUENCES_PER_SHARD = 4096
# A batch is large enough for a fast tokenizer to spread over the cores, and small enough to be held for every source.
_DOCUMENTS_PER_BATCH = 512
_CHARACTERS_PER_BATCH = 1_000_000
# Near the end of a budget batches shrink, so that little is encoded in vain.
_CHARACTERS_PER_TOKEN = 4
_FEWEST_CHARACTERS_PER_BATCH = 50_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    document: Document
    split: Split
    fingerprint: Fingerprint
    tokens: Sequence[int]


class Tokenization:
    """The work on one token dataset; `run` writes everything at `url` but the manifest."""

    def __init__(self, settings: CorpusSettings, encoder: Encoder, seed: int, url: str, listed: Sequence[ListedSource]) -> None:
        self.listed = listed
        self.settings, self.encoder, self.seed, self.url = settings, encoder, seed, url
        self.budgets = {"train": settings.train_tokens, "held_out": settings.held_out_tokens}
        self.quotas = Quotas(weights_to_shares(settings), self.budgets)
        self.names = [source.name for _, source in settings.sources]
        self.dropped = [{"exact": 0, "near": 0} for _ in self.names]
        self.documents = 0

    def run(self) -> dict[Split, TokenSplit]:
        """The manifest's entry for each split."""
        packers = {split: Packer(self.settings, self.encoder.bos, self.encoder.separator) for split in SPLITS}
        writers = {split: _SplitWriter(split, self.url) for split in SPLITS}
        schema = _DOCUMENT_SCHEMA if self.settings.mixture else _DOCUMENT_SCHEMA.remove(len(_DOCUMENT_SCHEMA) - 1)
        with (
            DocumentTable(self.url, schema) as table,
            closing(Duplicates(self.settings.near_duplicates)) as duplicates,
            progress(logger, "tokenize", sum(self.budgets.values()), "tokens") as advance,
        ):
            for source, found, room in self._taken(duplicates):
                split, document = found.split, found.document
                tokens = found.tokens[:room]
                writers[split].add(packers[split].add(self.documents, tokens))
                table.add(
                    self.documents, document.name, document.sha256, split, len(document.text), len(found.tokens),
                    self.names[source],
                )  # fmt: skip
                self.quotas.take(source, split, len(tokens))
                self.documents += 1
                advance(len(tokens), "")
        for split in SPLITS:
            writers[split].add(packers[split].finish())
        return {split: writer.close() for split, writer in writers.items()}

    def _taken(self, duplicates: Duplicates) -> Iterator[tuple[int, _Candidate, int]]:
        """(source, document, tokens that may be taken of it), in the order in which they are packed."""
        streams = [self._encoded(source, duplicates) for source in range(len(self.names))]
        while (source := self.quotas.next_source()) is not None:
            found = next(streams[source], None)
            if found is None:
                self._end(source)
                continue
            room = self.quotas.room(source, found.split)
            if room == 0 or not found.tokens:
                continue
            resemblance = duplicates.find(found.fingerprint)
            if resemblance is not None:
                self.dropped[source][resemblance] += 1
                continue
            duplicates.take(found.fingerprint)
            yield source, found, room

    def _encoded(self, source: int, duplicates: Duplicates) -> Iterator[_Candidate]:
        """A source's documents with their tokens; those that are sure not to be taken are not encoded."""
        field, settings = self.settings.sources[source]
        documents = read_documents(settings, field, self.seed, self.encoder.render, self.listed[source])
        encode = self.encoder.of(rendered=settings.messages_column is not None or not settings.split_special_tokens)
        while batch := _batch(documents, self._batch_characters(source)):
            sides = [document.split(self.settings.held_out_fraction) for document in batch]
            open_ones = [
                (document, split) for document, split in zip(batch, sides, strict=True) if self.quotas.room(source, split)
            ]
            prints = duplicates.fingerprints([document.text for document, _ in open_ones])
            fresh = []
            for (document, split), fingerprint in zip(open_ones, prints, strict=True):
                if duplicates.is_copy(fingerprint):
                    self.dropped[source]["exact"] += 1
                else:
                    fresh.append((document, split, fingerprint))
            encoded = encode([document.text for document, _, _ in fresh]) if fresh else []
            for (document, split, fingerprint), tokens in zip(fresh, encoded, strict=True):
                ids = tokens if document.tokens is None else document.tokens
                yield _Candidate(document=document, split=split, fingerprint=fingerprint, tokens=ids)

    def _batch_characters(self, source: int) -> int:
        room = sum(self.quotas.room(source, split) for split in SPLITS)
        return min(max(_CHARACTERS_PER_TOKEN * room, _FEWEST_CHARACTERS_PER_BATCH), _CHARACTERS_PER_BATCH)

    def _end(self, source: int) -> None:
        self.quotas.end(source)
        given = self.quotas.tokens[source]
        rest = "; the token dataset is smaller than asked for"
        if not all(self.quotas.ended):
            rest = ", short of its share, which the other sources fill"
        tokens = f"{given['train']:,} train and {given['held_out']:,} held-out tokens"
        logger.warning("corpus: %s ended after %s%s", self.names[source], tokens, rest)


class _SplitWriter:
    """Shards of one split, all of the same length but the last."""

    def __init__(self, split: Split, url: str) -> None:
        self._shards = ShardWriter(split, url)
        self.tokens = 0
        self.documents = 0
        self._last_document = -1
        self._held: list[np.ndarray] = []
        self._count = 0

    def add(self, sequences: np.ndarray) -> None:
        if len(sequences):
            self._held.append(sequences.astype(np.int64, copy=False))
            self._count += len(sequences)
        while self._count >= _SEQUENCES_PER_SHARD:
            joined = np.concatenate(self._held)
            self._write(joined[:_SEQUENCES_PER_SHARD])
            self._held = [joined[_SEQUENCES_PER_SHARD:]]
            self._count -= _SEQUENCES_PER_SHARD

    def close(self) -> TokenSplit:
        if self._count:
            self._write(np.concatenate(self._held))
        made = tuple(self._shards.made)
        sequences = sum(shard.sequences for shard in made)
        return TokenSplit(tokens=self.tokens, sequences=sequences, documents=self.documents, shards=made)

    def _write(self, sequences: np.ndarray) -> None:
        self._shards.write(sequences[:, 0], sequences[:, 1], sequences[:, 2])
        found = np.unique(sequences[:, 1][sequences[:, 1] >= 0])
        self.tokens += int((sequences[:, 1] >= 0).sum())
        # Ids of a split arrive in order, so only the first may have been counted with the shard before.
        self.documents += len(found) - int(found[0] == self._last_document)
        self._last_document = int(found[-1])


_DOCUMENT_SCHEMA = pa.schema(
    {
        "document": pa.int64(),
        "name": pa.string(),
        "sha256": pa.string(),
        "split": pa.string(),
        "characters": pa.int64(),
        "tokens": pa.int64(),
        "source": pa.string(),  # only where there is a mixture
    }
)


def _batch(documents: Iterator[Document], characters: int) -> list[Document]:
    """The next documents, up to the one that reaches `characters`; empty where there are none left."""
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        characters -= len(document.text)
        if len(batch) == _DOCUMENTS_PER_BATCH or characters <= 0:
            break
    return batch
