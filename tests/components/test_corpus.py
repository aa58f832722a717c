"""Every token of every document is packed once, and no document stands on both sides of the split."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from components.corpus.documents import Document, split_of
from components.corpus.encoder import Encoder
from components.corpus.settings import CorpusSettings
from components.corpus.sources import corpus_content, list_corpus, read_documents
from components.corpus.standard_library import read_standard_library
from components.corpus.tokens import PADDING, SPECIAL, prepare_tokens, read_sequences
from components.settings import UserError

BOS, END = 1, 2


def corpus_identity(settings):
    return corpus_content(settings, list_corpus(settings))


def characters(texts: list[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


ENCODER = Encoder(encode=characters, bos=BOS, separator=END)


def settings(folder: Path, **more) -> CorpusSettings:
    values = {"held_out_fraction": 0.3, "context_length": 16, "train_tokens": 10**6, "held_out_tokens": 10**6, **more}
    return CorpusSettings(source="files", paths=(str(folder),), **values)


def documents_of(chosen: CorpusSettings, seed: int = 0) -> list[Document]:
    return [document for field, source in chosen.sources for document in read_documents(source, field, seed)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"<{number}>" + "abcdefghij"[: number % 10] * (number % 7 + 1))
    (texts / "copy.txt").write_text((texts / "7.txt").read_text())
    (texts / "empty.txt").write_text("  \n")
    return texts


def rebuilt(url: str, manifest: dict, split: str) -> dict[int, str]:
    """The documents' texts, from the sequences alone."""
    entry = manifest.splits[split]
    block = read_sequences(url, manifest, split, 0, entry.sequences)
    found: dict[int, dict[int, str]] = {}
    for token, document, position in zip(block.tokens.ravel(), block.documents.ravel(), block.positions.ravel(), strict=True):
        if document >= 0:
            assert position not in found.setdefault(int(document), {}), "a token stands twice"
            found[int(document)][int(position)] = chr(token)
    return {document: "".join(text[i] for i in range(len(text))) for document, text in found.items()}


@pytest.mark.parametrize("packing", ["crossing", "within_document"])
@pytest.mark.parametrize("bos", ["sequence", "document", "none"])
def test_every_document_is_packed_whole_and_once(folder: Path, tmp_path: Path, packing: str, bos: str):
    chosen = settings(folder, packing=packing, bos=bos)
    url = str(tmp_path / "tokens")
    manifest = prepare_tokens(chosen, ENCODER, 0, url)
    texts = {split: rebuilt(url, manifest, split) for split in ("train", "held_out")}
    expected = {document.text for document in documents_of(chosen)}
    assert sorted([*texts["train"].values(), *texts["held_out"].values()]) == sorted(expected)
    assert not set(texts["train"]) & set(texts["held_out"])
    table = pq.read_table(f"{url}/documents.parquet").to_pydict()
    for document, split, name in zip(table["document"], table["split"], table["name"], strict=True):
        assert texts[split][document] == (folder / name).read_text()
    for split in texts:
        block = read_sequences(url, manifest, split, 0, 10**6)
        assert manifest.splits[split].tokens == int((block.documents >= 0).sum())
        assert (block.tokens[:, 0] == BOS).all() == (bos == "sequence") or bos == "document"
        if packing == "within_document":
            owners = [set(row[row >= 0]) for row in block.documents]
            assert all(len(owner) == 1 for owner in owners)
        else:
            # the separators of all documents but perhaps the last, and padding in the last sequence alone
            assert (block.documents[:-1] != PADDING).all()
            assert ((block.tokens == END) & (block.documents == SPECIAL)).sum() >= len(texts[split]) - 1


def test_a_split_looks_at_the_text_alone():
    sides = {split_of(f"text {number}", 0.25) for number in range(100)}
    assert sides == {"train", "held_out"}
    share = np.mean([split_of(f"text {number}", 0.25) == "held_out" for number in range(4000)])
    assert abs(share - 0.25) < 0.03
    # what is held out at a small fraction is held out at every larger one
    assert all(split_of(f"{n}", 0.5) == "held_out" for n in range(500) if split_of(f"{n}", 0.1) == "held_out")


def test_the_same_settings_give_the_same_bytes(folder: Path, tmp_path: Path):
    manifests = [prepare_tokens(settings(folder), ENCODER, 3, str(tmp_path / name)) for name in "ab"]
    assert manifests[0] == manifests[1]
    assert prepare_tokens(settings(folder), ENCODER, 4, str(tmp_path / "c")).splits != manifests[0].splits


def test_a_budget_of_tokens_is_kept(folder: Path, tmp_path: Path):
    manifest = prepare_tokens(settings(folder, train_tokens=50, held_out_tokens=20), ENCODER, 0, str(tmp_path / "t"))
    assert [manifest.splits[split].tokens for split in ("train", "held_out")] == [50, 20]


def test_json_lines_plain_and_compressed_are_read(tmp_path: Path):
    lines = [json.dumps({"body": f"text {number}"}) for number in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines[0].replace("0", "9") + "\n")
    chosen = CorpusSettings(source="files", paths=(str(tmp_path / "*.jsonl*"),), text_column="body")
    assert sorted(d.text for d in documents_of(chosen)) == ["text 0", "text 1", "text 2", "text 9"]
    with pytest.raises(UserError, match=r"text_column.*'other'"):
        documents_of(chosen.model_copy(update={"text_column": "other"}))


def test_what_is_not_text_is_named(tmp_path: Path):
    (tmp_path / "binary.txt").write_bytes(b"text \xff\xfe")
    with pytest.raises(UserError, match=r"corpus\.paths.*binary\.txt.*UTF-8"):
        documents_of(CorpusSettings(source="files", paths=(str(tmp_path / "binary.txt"),)))
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}')
    with pytest.raises(UserError, match=r"half\.jsonl:1.*surrogate"):
        documents_of(CorpusSettings(source="files", paths=(str(tmp_path / "half.jsonl"),)))


@pytest.mark.parametrize("dataset", ["a/b/c", "nobody/nothing"])
def test_a_hub_corpus_that_cannot_be_had_is_named(dataset: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=rf"corpus\.dataset.*{dataset}"):
        corpus_identity(CorpusSettings(source="huggingface", dataset=dataset))


def test_a_missing_corpus_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"corpus\.paths.*nowhere"):
        corpus_identity(CorpusSettings(source="files", paths=(str(tmp_path / "nowhere"),)))


def test_a_split_without_documents_is_an_error(tmp_path: Path):
    (tmp_path / "one.txt").write_text("only one document")
    with pytest.raises(UserError, match="held_out_fraction"):
        prepare_tokens(settings(tmp_path / "one.txt"), ENCODER, 0, str(tmp_path / "tokens"))


def test_a_changed_file_changes_the_identity(folder: Path):
    before = corpus_identity(settings(folder))
    (folder / "3.txt").write_text("something else")
    assert corpus_identity(settings(folder)) != before


def test_the_standard_library_is_a_corpus_of_hundreds_of_documents():
    names = [document.name for document in read_standard_library()]
    assert len(names) > 300
    assert names == sorted(names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
