"""Documents from files, local or `s3:`: text, JSON lines in any compression, JSON, Parquet, whatever the case of their names.

Memory: one file of text or JSON, one line of JSON lines, one batch of Parquet rows.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from components.corpus.documents import Document, Render, document_from_row
from components.corpus.listing import ListedFile
from components.corpus.settings import SourceSettings
from components.settings import UserError
from components.storage import resolve

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_ROWS_PER_BATCH = 256
_BUFFER_BYTES = 8 << 20
_DAMAGE = (pa.ArrowException, EOFError, zlib.error, lzma.LZMAError, OSError)

Rows = Iterator[tuple[str, dict[str, Any]]]
"""(name, row) of each row of a table."""


def kind_of(name: str) -> Literal["parquet", "lines", "json", "text"]:
    """What a file's name says that it holds; `json` is one value or lines, which only its content tells."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        del suffixes[-1]
    last = suffixes[-1] if suffixes else ""
    if last in _LINES:
        return "lines"
    return "json" if last == ".json" else "parquet" if name.lower().endswith(".parquet") else "text"


def formats_identity(files: Sequence[ListedFile]) -> dict[str, Any]:
    """What is new in how files become documents, so that it has another name: tables that were once one document each."""
    tables = (".parquet", *(".jsonl" + compression for compression in ("", *_COMPRESSIONS)))
    anew = any(kind_of(file.name) != "text" and not file.name.endswith(tables) for file in files)
    return {"formats": "by content"} if anew else {}


def read_file(file: ListedFile, source: SourceSettings, where: str, render: Render | None) -> Iterator[Document]:
    """The documents of one file, in its order; `where` is the source's place in the configuration."""
    file.require_unchanged(f"{where}.paths")
    with damage_explained(file, f"{where}.paths"):
        kind = kind_of(file.name)
        rows = None if kind == "text" else read_rows(file, kind, source, where)
        if rows is not None:
            for name, row in rows:
                document = document_from_row(row, name, source, where, render)
                if document is not None:
                    yield document
        elif source.messages_column is not None:
            raise UserError(f"{where}.messages_column: '{file.path}' is neither JSONL nor Parquet and has no column")
        else:
            with _opened(file) as stream:
                text = stream.read()
            _require_no_lines(text, file, source, where)
            if text.strip():
                yield Document(name=file.name, text=text)


@contextmanager
def damage_explained(file: ListedFile, where: str) -> Iterator[None]:
    """What cannot be read as its name says as a UserError at `where`."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: '{file.path}' is not UTF-8 text ({error.reason})") from error
    except (*_DAMAGE, _zstd().ZstdError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        refused = isinstance(error, OSError) and error.errno is not None  # by the system, and not by a decoder
        what = "cannot be read" if refused else "is damaged or not what its name says"
        raise UserError(f"{where}: '{file.path}' {what} ({reason})") from error


def read_rows(
    file: ListedFile, kind: str, source: SourceSettings, where: str, also: Mapping[str, str] | None = None
) -> Rows | None:
    """The rows of a table that `kind_of` named; None for a `.json` that is none, and so a text. also: further columns that a
    Parquet file must have, by the settings under `where` that name them."""
    if kind == "parquet":
        setting = "text_column" if source.messages_column is None else "messages_column"
        return _read_parquet(file, {setting: _wanted(source), **(also or {})}, where)
    return _read_lines(file, source, where) if kind == "lines" or _holds_lines(file, source) else _read_json(file, source)


def _wanted(source: SourceSettings) -> str:
    return source.messages_column or source.text_column


def _first_lines(stream: Iterator[str], count: int) -> list[str]:
    return list(islice((line for line in stream if line.strip()), count))


def _holds_lines(file: ListedFile, source: SourceSettings) -> bool:
    """Whether a `.json` is an object a line: of several, or of one that has the column."""
    with _opened(file) as stream:
        values = [_parsed(line) for line in _first_lines(stream, 2)]
    if not values or not isinstance(values[0], dict):
        return False
    return len(values) == 2 or source.messages_column is not None or _wanted(source) in values[0]


def _read_json(file: ListedFile, source: SourceSettings) -> Rows | None:
    """Of a file that is one JSON value: a list of objects, or an object, with the column. Memory: the file."""
    with _opened(file) as stream:
        value = _parsed(stream.read())
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(row, dict) for row in values):
        return None
    if not any(_wanted(source) in row for row in values):
        return None
    return ((f"{file.name}:{number}", row) for number, row in enumerate(values))


def _require_no_lines(text: str, file: ListedFile, source: SourceSettings, where: str) -> None:
    """Lines of JSON under the name of a text would be one document, braces and all."""
    if not text.lstrip().startswith("{"):
        return
    values = [_parsed(line) for line in _first_lines(iter(text.splitlines()), 2)]
    if len(values) == 2 and all(isinstance(value, dict) and _wanted(source) in value for value in values):
        raise UserError(f"{where}.paths: '{file.path}' holds an object of JSON in each line; rename it to end in .jsonl")


def _parsed(text: str) -> Any:
    """A JSON value, None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_lines(file: ListedFile, source: SourceSettings, where: str) -> Rows:
    column, place = _wanted(source), f"{where}.{'dataset' if source.source == 'huggingface' else 'paths'}"
    quoted = json.dumps(column)
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: line {number} of '{file.path}' is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{place}: line {number} of '{file.path}' is a {type(row).__name__}, not a JSON object")
            if line.count(quoted) > 1 and _names(line).count(column) > 1:
                raise UserError(f"{place}: line {number} of '{file.path}' has '{column}' twice")
            yield f"{file.name}:{number}", row


def _names(line: str) -> list[str]:
    """The keys of an object of JSON, each as often as it is there."""
    names: list[list[str]] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names.append([name for name, _ in pairs])

    json.loads(line, object_pairs_hook=note)
    return names[-1]  # the outermost object ends last


def _read_parquet(file: ListedFile, columns: Mapping[str, str], where: str) -> Rows:
    # Buffered and not read ahead: pages come one by one, where a whole column chunk would be held otherwise.
    filesystem, path = resolve(file.url)
    with pq.ParquetFile(path, filesystem=filesystem, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
        names = table.schema_arrow.names
        for setting, column in columns.items():
            if names.count(column) != 1:
                found = "is no column" if column not in names else "is the name of several columns"
                raise UserError(f"{where}.{setting}: '{column}' {found} of '{file.path}', which has {', '.join(names)}")
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(dict.fromkeys(columns.values()))):
            for row in batch.to_pylist():
                yield f"{file.name}:{number}", row
                number += 1


@contextmanager
def _opened(file: ListedFile) -> Iterator[IO[str]]:
    """The file as text, decompressed by its suffix. A file that ends too early raises EOFError."""
    filesystem, path = resolve(file.url)
    with filesystem.open(path, "rb") as raw:
        suffix = PurePosixPath(file.name).suffix.lower()
        stream: Any = raw
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".bz2":
            stream = bz2.BZ2File(raw)
        elif suffix == ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115
        elif suffix == ".zst":
            # Dumps of web text are often packed with a window of 2 GB, over the decoder's default of 128 MB.
            zstd = _zstd()
            stream = zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31})
        with io.TextIOWrapper(cast(IO[bytes], stream), encoding="utf-8-sig") as text:
            yield text


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
