"""What is listed of a corpus is what is read, and a file is what it holds, whatever it is called."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from components.corpus.documents import Document
from components.corpus.settings import CorpusSettings
from components.corpus.sources import corpus_content, list_corpus, read_documents
from components.settings import UserError

TEXTS = [f"text {number} of the corpus" for number in range(40)]
OPENERS = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}


def from_files(*paths: Path | str, **more) -> CorpusSettings:
    return CorpusSettings(source="files", paths=tuple(str(path) for path in paths), **more)


def read(chosen: CorpusSettings) -> list[Document]:
    return [document for field, source in chosen.sources for document in read_documents(source, field, 0)]


def texts(chosen: CorpusSettings) -> list[str]:
    return sorted(document.text for document in read(chosen))


def identity(chosen: CorpusSettings) -> dict:
    return corpus_content(chosen, list_corpus(chosen))


def jsonl(path: Path, lines: list[str], opened=open) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wt", encoding="utf-8") as stream:
        stream.write("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return path


def snapshot(folder: Path) -> Path:
    """As the Hub's cache lays one out: a folder of links to files that are named by their hashes."""
    made = folder / "datasets--a--b" / "snapshots" / "0123"
    for number in range(4):
        blob = jsonl(folder / "datasets--a--b" / "blobs" / f"{number:040x}", TEXTS[number::4])
        (made / "data").mkdir(parents=True, exist_ok=True)
        (made / "data" / f"train-{number}.jsonl").symlink_to(os.path.relpath(blob, made / "data"))
    return made


# links


@pytest.mark.parametrize("source", ["files", "pattern", "huggingface"])
def test_a_snapshot_in_the_hubs_cache_is_listed_and_read_whole(source: str, tmp_path: Path):
    made = snapshot(tmp_path)
    if source == "huggingface":
        chosen = CorpusSettings(source="huggingface", dataset=str(made))
    else:
        chosen = from_files(made if source == "files" else made / "**" / "*.jsonl")
    assert texts(chosen) == sorted(TEXTS)
    before = identity(chosen)
    (blob,) = (tmp_path / "datasets--a--b" / "blobs").glob("*0")
    jsonl(blob, ["something else"])
    assert identity(chosen) != before, "other data under the same digest"


def test_links_to_folders_are_followed_and_one_that_leads_back_up_is_passed_over(tmp_path: Path):
    jsonl(tmp_path / "elsewhere" / "b.jsonl", TEXTS[20:])
    corpus = tmp_path / "corpus"
    jsonl(corpus / "a.jsonl", TEXTS[:20])
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to(corpus)
    (tmp_path / "elsewhere" / "back").symlink_to(corpus)
    assert [file.name for file in list_corpus(from_files(corpus))[0].files] == ["a.jsonl", "linked/b.jsonl"]
    assert texts(from_files(corpus)) == texts(from_files(corpus / "**" / "*.jsonl")) == sorted(TEXTS)


def test_a_link_to_nothing_and_a_folder_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / ".#a.jsonl").symlink_to("nobody@nowhere")  # an editor's lock is hidden, and passed over
    assert texts(from_files(tmp_path)) == sorted(TEXTS)
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    for paths in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=r"^corpus\.paths: '.*b\.jsonl' is a link to 'gone\.jsonl', which is not there"):
            list_corpus(from_files(paths))
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):  # whoever runs the tests may be root, to whom no folder is closed
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"folder '.*closed' cannot be listed"):
        list_corpus(from_files(tmp_path))


def test_a_linked_folder_in_a_hugging_face_dataset_is_refused_since_datasets_passes_it_over(tmp_path: Path):
    jsonl(tmp_path / "elsewhere" / "train-1.jsonl", TEXTS[20:])
    jsonl(tmp_path / "dataset" / "train-0.jsonl", TEXTS[:20])
    (tmp_path / "dataset" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"^corpus\.dataset: .*more' is a link to a folder"):
        list_corpus(CorpusSettings(source="huggingface", dataset=str(tmp_path / "dataset")))


@pytest.mark.parametrize("path", ["~", "/", "~/.."])
def test_the_whole_home_folder_is_no_corpus(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"^corpus\.paths: '.*' is your whole home folder, or holds it"):
        list_corpus(from_files(path))


# formats


@pytest.mark.parametrize(
    "name",
    ["a.json", "a.ndjson", "a.JSONL", "a.jsonlines", "a.json.gz", "c4-train.00000-of-01024.json.gz", "a.JSON.GZ", "a.jsonl.ZST",
     "a.ndjson.bz2", "a.Json.xz"],
)  # fmt: skip
def test_lines_of_json_are_documents_whatever_the_file_is_called(name: str, tmp_path: Path):
    suffix = Path(name).suffix.lower()
    jsonl(tmp_path / name, TEXTS, OPENERS.get(suffix, open))
    found = read(from_files(tmp_path))
    assert [document.text for document in found] == TEXTS
    assert found[0].name == f"{name}:1"


def test_a_list_of_objects_is_a_table_and_other_json_a_text(tmp_path: Path):
    rows = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
    (tmp_path / "indented.json").write_text(json.dumps(rows, indent=2))
    assert texts(from_files(tmp_path)) == sorted(TEXTS)
    (tmp_path / "indented.json").write_text(json.dumps(rows))
    assert texts(from_files(tmp_path)) == sorted(TEXTS)
    settings = json.dumps({"name": "a-package", "version": "1"}, indent=2)
    (tmp_path / "indented.json").write_text(settings)
    assert texts(from_files(tmp_path)) == [settings], "a file of source code"
    (tmp_path / "indented.json").write_text('{"body": "a"}\n{"body": "b"}\n')
    with pytest.raises(UserError, match=r"^corpus\.text_column: 'text' is not in indented\.json:1, which has body"):
        texts(from_files(tmp_path))


def test_what_was_one_document_and_is_a_table_now_has_another_digest(tmp_path: Path):
    """The digests of what is read as it always was stay; see the golden file."""
    jsonl(tmp_path / "a" / "x.jsonl", TEXTS)
    jsonl(tmp_path / "b" / "x.ndjson", TEXTS)
    assert "formats" not in identity(from_files(tmp_path / "a"))
    assert identity(from_files(tmp_path / "b"))["formats"] == "by content"


def test_parquet_is_recognised_in_any_case(tmp_path: Path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "A.PARQUET")
    assert texts(from_files(tmp_path)) == sorted(TEXTS)


def test_lines_of_json_under_the_name_of_a_text_are_refused(tmp_path: Path):
    jsonl(tmp_path / "a.txt", TEXTS)
    with pytest.raises(UserError, match=r"a\.txt' holds an object of JSON in each line; rename it to end in \.jsonl"):
        read(from_files(tmp_path))
    (tmp_path / "a.txt").write_text('{"other": 1}\n{"other": 2}\n')
    assert len(read(from_files(tmp_path))) == 1, "a text that is no table of the column"


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "plain"])
def test_a_damaged_compressed_file_is_one_sentence(suffix: str, harm: str, tmp_path: Path):
    path = jsonl(tmp_path / f"a.jsonl{suffix}", TEXTS, OPENERS[suffix])
    raw = bytearray(path.read_bytes())
    if harm == "cut":
        raw = raw[: len(raw) // 2]
    elif harm == "flipped":
        raw[len(raw) // 2] ^= 0xFF
    else:
        raw = bytearray(b"not compressed at all\n")
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"^corpus\.paths: ") as caught:
        read(from_files(tmp_path))
    assert "\n" not in str(caught.value)


def test_json_that_is_nested_too_deeply_is_one_sentence(tmp_path: Path):
    deep = "[" * 200_000 + "]" * 200_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": {deep}}}\n')
    with pytest.raises(UserError, match=r"line 1 of '.*a\.jsonl' is not JSON"):
        read(from_files(tmp_path))


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "meta": {"text": "x"}}\n{"text": "first", "text": "second"}\n')
    with pytest.raises(UserError, match=r"line 2 of '.*a\.jsonl' has 'text' twice"):
        read(from_files(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"^corpus\.text_column: 'text' is the name of several columns"):
        read(from_files(tmp_path))


# Hugging Face datasets


ODD_COLUMNS = {
    "null in the first file": [{"meta": [None] * 20}, {"meta": ["x"] * 20}],
    "empty in the first file": [{"meta": [[]] * 20}, {"meta": [[{"a": 1}]] * 20}],
    "another type": [{"meta": [1] * 20}, {"meta": ["x"] * 20}],
    "one more": [{}, {"more": ["y"] * 20}],
    "one fewer": [{"more": ["y"] * 20}, {}],
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json.gz", "csv", "arrow"])
@pytest.mark.parametrize("columns", ODD_COLUMNS)
def test_only_the_text_column_of_a_local_dataset_is_asked_for(kind: str, columns: str, tmp_path: Path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for number, more in enumerate(ODD_COLUMNS[columns]):
        table = {**more, "text": TEXTS[20 * number : 20 * number + 20]}
        if kind == "csv" and any(isinstance(value, list) for value in table.get("meta", [])):
            table["meta"] = ["[]"] * 20
        held, path = datasets.Dataset.from_dict(table), folder / f"train-{number}.{kind}"
        if kind == "parquet":
            held.to_parquet(path)
        elif kind == "csv":
            held.to_csv(path)
        elif kind == "arrow":
            held.save_to_disk(tmp_path / f"saved-{number}")
            (tmp_path / f"saved-{number}" / "data-00000-of-00001.arrow").rename(path)
        else:
            opened = gzip.open if kind == "json.gz" else open
            with opened(path, "wt") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in held.to_list())
    found = read(CorpusSettings(source="huggingface", dataset=str(folder)))
    assert [document.text for document in found] == TEXTS


def test_the_text_may_be_null_in_a_whole_file_of_a_local_dataset(tmp_path: Path):
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "train-1.parquet")
    assert texts(CorpusSettings(source="huggingface", dataset=str(tmp_path))) == sorted(TEXTS)
