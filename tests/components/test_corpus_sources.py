"""The same texts are the same documents, whatever kind of file or dataset holds them and wherever it lies."""

from __future__ import annotations

import base64
import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from components.corpus.documents import Document
from components.corpus.settings import CorpusSettings
from components.corpus.sources import corpus_content, list_corpus, read_documents
from components.language_model.loading import find_model, load_encoder, load_tokenizer
from components.language_model.settings import LanguageModelSettings
from components.run.checks import check
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError

TEXTS = [f"text {number}: " + "naïve 你好 🙂\n" * (number % 5) for number in range(30)]
BLANK = ["", " \n"]


def corpus_identity(settings):
    return corpus_content(settings, list_corpus(settings))


def documents_of(chosen: CorpusSettings, seed: int = 0, render=None) -> list[Document]:
    return [document for field, source in chosen.sources for document in read_documents(source, field, seed, render)]


def from_files(*paths: Path | str, **more) -> CorpusSettings:
    return CorpusSettings(source="files", paths=tuple(str(path) for path in paths), **more)


def rows(column: str = "text") -> list[dict]:
    return [{column: text, "other": 1} for text in [*TEXTS, *BLANK]]


def write_jsonl(path: Path, opened: Callable) -> None:
    with opened(path, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(json.dumps(row) for row in rows()) + "\n\n")


@pytest.fixture(params=["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "parquet", "text", "txt.gz"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, folder = request.param, tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_bytes(b"\xff\xfe not text")
    openers = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": zstd.open}
    if kind == "parquet":
        pq.write_table(
            pa.Table.from_pylist([*rows(), {"text": None, "other": 2}]), folder / "deep" / "a.parquet", row_group_size=7
        )
    elif kind.startswith("jsonl"):
        write_jsonl(folder / "deep" / f"a.{kind}", openers.get(kind.removeprefix("jsonl."), open))
    else:
        opened, suffix = (gzip.open, "txt.gz") if kind == "txt.gz" else (open, "py")
        for number, text in enumerate([*TEXTS, *BLANK]):
            with opened(folder / "deep" / f"{number}.{suffix}", "wt", encoding="utf-8") as stream:
                stream.write(text)
    return folder


def test_every_kind_of_file_gives_the_same_documents(files: Path):
    for paths in ([files], [files / "**" / "*.*"], [*(files / "deep").iterdir()]):
        assert sorted(document.text for document in documents_of(from_files(*paths))) == sorted(TEXTS), paths


def test_a_moved_corpus_keeps_its_identity_names_and_order(files: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(files, moved)
    for before, after in [((files,), (moved,)), ((files / "**" / "*.*",), (moved / "**" / "*.*",))]:
        assert corpus_identity(from_files(*before)) == corpus_identity(from_files(*after))
        assert documents_of(from_files(*before), 5) == documents_of(from_files(*after), 5)
    changed = next(path for path in moved.rglob("deep/*"))
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert corpus_identity(from_files(files)) != corpus_identity(from_files(moved))


def test_names_lead_back_to_the_source(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(f"text in {folder}")
    pq.write_table(pa.table({"text": ["p", "q"]}), tmp_path / "t.parquet")
    (tmp_path / "l.jsonl").write_text('\n{"text": "r"}\n')
    chosen = from_files(tmp_path / "a", tmp_path / "b", tmp_path / "t.parquet", tmp_path / "l.jsonl")
    named = {document.name: document.text for document in documents_of(chosen)}
    assert named == {
        "0/x.txt": "text in a", "1/x.txt": "text in b", "2/t.parquet:0": "p", "2/t.parquet:1": "q", "3/l.jsonl:2": "r"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "json", "csv", "arrow", "saved", "saved_dict", "file"])
def test_a_local_hugging_face_dataset_gives_the_same_documents(kind: str, tmp_path: Path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    held = datasets.Dataset.from_list(rows())
    if kind == "parquet":
        held.to_parquet(folder / "train.parquet")
    elif kind in ("json", "file"):
        held.to_json(folder / "train.jsonl")
    elif kind == "csv":
        held.to_csv(folder / "train.csv")
    elif kind == "arrow":
        held.save_to_disk(tmp_path / "saved")
        shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", folder / "train.arrow")
    elif kind == "saved":
        held.save_to_disk(folder)
    else:
        datasets.DatasetDict(train=held, test=held.select([0])).save_to_disk(folder)
    name = folder / "train.jsonl" if kind == "file" else folder
    chosen = CorpusSettings(source="huggingface", dataset=str(name))
    assert [document.text for document in documents_of(chosen)] == TEXTS
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    elsewhere = chosen.model_copy(update={"dataset": str(moved / "train.jsonl" if kind == "file" else moved)})
    assert corpus_identity(elsewhere) == corpus_identity(chosen)
    if kind != "saved":
        with pytest.raises(UserError, match=r"corpus\.dataset.*'nowhere'"):
            documents_of(chosen.model_copy(update={"dataset_split": "nowhere"}))


def test_a_zstd_file_of_several_frames_or_a_long_window_is_read_whole(tmp_path: Path):
    long_window = {zstd.CompressionParameter.window_log: 28}
    frames = []
    for text in TEXTS:
        compressor = zstd.ZstdCompressor(options=long_window)
        # In two pieces, so that the frame does not know its size and asks for the whole window.
        frames.append(
            compressor.compress(json.dumps({"text": text}).encode()) + compressor.compress(b"\n") + compressor.flush()
        )
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [document.text for document in documents_of(from_files(tmp_path))] == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".parquet"])
def test_a_truncated_file_is_an_error_and_not_a_shorter_corpus(suffix: str, tmp_path: Path):
    path = tmp_path / ("t.parquet" if suffix == ".parquet" else f"a.jsonl{suffix}")
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path)
    else:
        write_jsonl(path, {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}[suffix])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"corpus\.paths: '{path}' is damaged") as caught:
        documents_of(from_files(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_memory_of_a_parquet_file_does_not_depend_on_its_row_groups(tmp_path: Path):
    lines = [base64.b64encode(os.urandom(3000)).decode() for _ in range(20_000)]
    pq.write_table(pa.table({"text": lines}), tmp_path / "t.parquet", row_group_size=10**6, use_dictionary=False)
    code = f"""
import pyarrow as pa
from components.corpus.settings import CorpusSettings
from components.corpus.sources import read_documents
[(field, source)] = CorpusSettings(source="files", paths=("{tmp_path}/t.parquet",)).sources
assert sum(len(document.text) for document in read_documents(source, field, 0)) == {sum(map(len, lines))}
print(pa.default_memory_pool().max_memory() / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30, "MB, of one row group of 80 MB"


def test_a_damaged_local_dataset_is_one_sentence(tmp_path: Path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "train.parquet")
    (tmp_path / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"corpus\.dataset: .*train\.parquet' is damaged") as caught:
        documents_of(CorpusSettings(source="huggingface", dataset=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_wrong_column_or_row_is_one_sentence(tmp_path: Path):
    pq.write_table(pa.table({"body": ["a"], "number": [5]}), tmp_path / "t.parquet")
    (tmp_path / "l.jsonl").write_text('{"body": "a"}\nnonsense\n')
    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(tmp_path / "saved")
    cases = [
        (from_files(tmp_path / "t.parquet"), r"^corpus\.text_column: 'text' .*t\.parquet.* body, number$"),
        (from_files(tmp_path / "t.parquet", text_column="number"), r"^corpus\.text_column: 'number' .*t\.parquet:0 is a int"),
        (from_files(tmp_path / "l.jsonl"), r"^corpus\.text_column: 'text' .*l\.jsonl:1.* body$"),
        (from_files(tmp_path / "l.jsonl", text_column="body"), r"^corpus\.paths: line 2 of .*l\.jsonl' is not JSON"),
        (CorpusSettings(source="huggingface", dataset=str(tmp_path / "saved")), r"^corpus\.text_column: 'text' .*saved.*body$"),
        (from_files(tmp_path / "*.txt"), r"^corpus\.paths: '.*\*\.txt' names no file"),
        (
            CorpusSettings(mixture=({"source": "standard_library", "weight": 1}, {**from_files(tmp_path / "l.jsonl").model_dump(
                include={"source", "paths"}), "weight": 1})),
            r"^corpus\.mixture\.1\.text_column: 'text'",
        ),
    ]  # fmt: skip
    for chosen, message in cases:
        with pytest.raises(UserError, match=message):
            documents_of(chosen)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"mixture": [{"weight": 0}]}, r"corpus\.mixture\.0\.weight: 0 .*greater than 0"),
        ({"mixture": [{"weight": -1}]}, r"corpus\.mixture\.0\.weight: -1 .*greater than 0"),
        ({"mixture": [{"weight": float("nan")}]}, r"corpus\.mixture\.0\.weight: nan .*finite"),
        ({"mixture": [{"source": "files", "paths": ["x"]}]}, r"corpus\.mixture\.0\.weight"),
        ({"mixture": [{"weight": 1}, {"weight": 1, "source": "files"}]}, r"corpus\.mixture\.1\.paths is empty"),
        ({"mixture": [{"weight": 1, "weigth": 1}]}, r"corpus\.mixture\.0\.weigth: .*did you mean 'weight'"),
        ({"mixture": [{"weight": 1, "name": "a"}] * 2}, r"two sources have the name 'a'"),
        ({"mixture": [{"weight": 1}], "text_column": "body"}, r"corpus\.text_column has no effect beside corpus\.mixture"),
        ({"source": "files", "paths": ["x"], "chat_template": "x"}, r"corpus\.chat_template has no effect without"),
        ({"paths": ["x"]}, r"corpus\.paths has no effect with source 'standard_library'"),
        ({"dataset": "x"}, r"corpus\.dataset has no effect with source 'standard_library'"),
        ({"bos": "always"}, r"corpus\.bos: 'always'"),
        ({"near_duplicates": {"threshold": 1.5}}, r"corpus\.near_duplicates\.threshold: 1\.5"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(corpus: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        parse_config({"corpus": corpus})
    assert "\n" not in str(caught.value)


# chat templates

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}"
    "{{ '!' if m.tool_calls is defined }}\n{% endfor %}"
)
TALKS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f" {n} is a number. " * (n % 3 + 1)}]
    for n in range(20)
]


@pytest.fixture(scope="module")
def chat_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> LanguageModelSettings:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return LanguageModelSettings(name=str(folder))


def write_talks(tmp_path: Path, kind: str) -> CorpusSettings:
    if kind == "jsonl":
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in TALKS))
        return from_files(tmp_path / "t.jsonl", messages_column="messages")
    # As tables have it: a key of one message is a null in all others.
    full = [[{"role": m["role"], "content": m["content"], "tool_calls": None} for m in talk] for talk in TALKS]
    message = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(pa.string())})
    table = pa.table({"messages": pa.array(full, pa.list_(message))})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "t.parquet")
        return from_files(tmp_path / "t.parquet", messages_column="messages")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    return CorpusSettings(source="huggingface", dataset=str(tmp_path / "saved"), messages_column="messages")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])
def test_conversations_are_rendered_as_the_tokenizer_does_it(kind: str, chat_model: LanguageModelSettings, tmp_path: Path):
    source = find_model(chat_model)
    encoder, tokenizer = load_encoder(source), load_tokenizer(source)
    found = documents_of(write_talks(tmp_path, kind), render=encoder.render)
    assert len(found) == len(TALKS)
    for talk, document, ids in zip(TALKS, found, encoder.of(rendered=True)([document.text for document in found]), strict=True):
        expected = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert expected[0] == tokenizer.bos_token_id
        assert list(ids) == list(expected[1:]), "the template's BOS is left to the corpus settings"
        assert tokenizer.bos_token not in document.text


def test_a_conversation_is_on_the_same_side_under_every_template(chat_model: LanguageModelSettings, tmp_path: Path):
    encoder = load_encoder(find_model(chat_model))
    chosen = write_talks(tmp_path, "jsonl")
    other = chosen.model_copy(update={"chat_template": "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"})
    one, two = (documents_of(settings, render=encoder.render) for settings in (chosen, other))
    assert [document.text for document in one] != [document.text for document in two]
    sides = [document.split(0.5) for document in one]
    assert set(sides) == {"train", "held_out"}
    assert sides == [document.split(0.5) for document in two]
    assert sides == [document.split(0.5) for document in documents_of(write_talks(tmp_path, "parquet"), render=encoder.render)]
    assert corpus_identity(chosen) != corpus_identity(other)


def test_another_template_is_another_tokenizer(chat_model: LanguageModelSettings, tiny_model: str):
    plain = find_model(LanguageModelSettings(name=tiny_model))
    assert find_model(chat_model).tokenizer_identity != plain.tokenizer_identity


def test_what_is_no_conversation_is_one_sentence(chat_model: LanguageModelSettings, tmp_path: Path):
    render = load_encoder(find_model(chat_model)).render
    for value in ["text", [], ["text"], [{"role": "user"}], [{"content": "x"}]]:
        (tmp_path / "t.jsonl").write_text(json.dumps({"messages": value}))
        with pytest.raises(UserError, match=r"corpus\.messages_column: 'messages' in t\.jsonl:1 .*list of \{role, content\}"):
            documents_of(from_files(tmp_path / "t.jsonl", messages_column="messages"), render=render)
    strict = from_files(
        tmp_path / "t.jsonl",
        messages_column="messages",
        chat_template="{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}x",
    )
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": TALKS[0]}))
    with pytest.raises(UserError, match=r"corpus\.messages_column: .*t\.jsonl:1.*no system message"):
        documents_of(strict, render=render)


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, r"corpus\.messages_column: the tokenizer of .* has no chat template"), ("{% for %}", r"corpus\.chat_template: ")],
)
def test_a_template_that_is_not_there_is_found_before_any_work(
    template: str | None, message: str, tiny_tree: dict, tmp_path: Path
):
    chosen = write_talks(tmp_path, "jsonl")
    tiny_tree["corpus"] |= {"paths": list(chosen.paths), "messages_column": "messages", "chat_template": template}
    with pytest.raises(UserError, match=message):
        check(resolve(parse_config(tiny_tree)))


def test_the_quick_way_to_encode_gives_the_tokenizers_own_ids(tiny_model: str):
    source = find_model(LanguageModelSettings(name=tiny_model))
    texts = [*TEXTS, "<|bos|> in a text", " leading", ""]
    tokenizer, encoder = load_tokenizer(source), load_encoder(source)
    for rendered in (False, True):
        expected = tokenizer(texts, add_special_tokens=False, split_special_tokens=not rendered)["input_ids"]
        assert [list(ids) for ids in encoder.of(rendered)(texts)] == expected
