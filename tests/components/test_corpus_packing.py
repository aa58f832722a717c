"""Packing against a second packer, written from the words of the settings: token by token, list by list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.corpus.documents import split_of
from components.corpus.encoder import Encoder
from components.corpus.settings import CorpusSettings
from components.corpus.sources import read_documents
from components.corpus.tokens import PADDING, SPECIAL, prepare_tokens, read_sequences

CONTEXT = 12


def naive(documents: list[tuple[int, list[int]]], bos_id: int, eos_id: int, bos: str, packing: str) -> list[list[tuple]]:
    """Sequences of (token, document, position)."""
    body = CONTEXT - (bos == "sequence")

    def cut(stream: list[tuple]) -> list[list[tuple]]:
        pieces = [stream[start : start + body] for start in range(0, len(stream), body)]
        pieces = [piece for piece in pieces if any(entry[1] >= 0 for entry in piece)]
        front = [(bos_id, SPECIAL, 0)] if bos == "sequence" else []
        return [front + piece + [(eos_id, PADDING, 0)] * (body - len(piece)) for piece in pieces]

    streams: list[list[tuple]] = []
    for number, tokens in documents:
        stream = [(bos_id, SPECIAL, 0)] if bos == "document" else []
        stream += [(token, number, position) for position, token in enumerate(tokens)]
        if packing == "crossing" and not (bos == "document" and bos_id == eos_id):
            stream.append((eos_id, SPECIAL, 0))
        streams.append(stream)
    if packing == "crossing":
        return cut([entry for stream in streams for entry in stream])
    return [sequence for stream in streams for sequence in cut(stream)]


@pytest.mark.parametrize("packing", ["crossing", "within_document"])
@pytest.mark.parametrize("bos", ["sequence", "document", "none"])
@pytest.mark.parametrize(("bos_id", "eos_id"), [(1, 2), (3, 3)], ids=["two tokens", "one token"])
def test_packing_is_what_the_settings_say(packing: str, bos: str, bos_id: int, eos_id: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("components.corpus.tokenization._SEQUENCES_PER_SHARD", 7)  # documents that continue in the next shard
    folder = tmp_path / "texts"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"{number:02d}" + "x" * int(random.integers(0, 40)))
    encoder = Encoder(encode=lambda texts: [[ord(c) for c in text] for text in texts], bos=bos_id, separator=eos_id)
    chosen = CorpusSettings(
        source="files", paths=(str(folder),), held_out_fraction=0.3, context_length=CONTEXT, packing=packing, bos=bos,
        train_tokens=500, held_out_tokens=10**6,
    )  # fmt: skip
    url = str(tmp_path / "tokens")
    manifest = prepare_tokens(chosen, encoder, 0, url)
    wanted: dict[str, list[tuple[int, list[int]]]] = {"train": [], "held_out": []}
    room = {"train": 500, "held_out": 10**6}
    number = 0
    for document in read_documents(chosen.sources[0][1], "corpus", 0):
        split = split_of(document.text, 0.3)
        if room[split]:
            tokens = [ord(c) for c in document.text][: room[split]]
            room[split] -= len(tokens)
            wanted[split].append((number, tokens))
            number += 1
    for split, documents in wanted.items():
        block = read_sequences(url, manifest, split, 0, 10**6)
        found = np.stack([block.tokens, block.documents, block.positions], axis=-1)
        assert found.tolist() == [[list(entry) for entry in row] for row in naive(documents, bos_id, eos_id, bos, packing)]
        entry = manifest.splits[split]
        assert entry.tokens == sum(len(tokens) for _, tokens in documents)
        assert entry.documents == len(documents)
        assert entry.sequences == len(found)


def test_no_sequence_is_without_a_counted_token_however_short(tmp_path: Path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"{number}xy")  # BOS and separator stand alone in a sequence of two
    encoder = Encoder(encode=lambda texts: [[ord(c) for c in text] for text in texts], bos=1, separator=2)
    chosen = CorpusSettings(
        source="files", paths=(str(tmp_path / "*.txt"),), held_out_fraction=0.4, context_length=2, bos="document"
    )
    manifest = prepare_tokens(chosen, encoder, 0, str(tmp_path / "tokens"))
    for split in manifest.splits:
        block = read_sequences(str(tmp_path / "tokens"), manifest, split, 0, 100)
        assert (block.documents >= 0).any(axis=1).all()
        assert int((block.documents >= 0).sum()) == manifest.splits[split].tokens
