"""Documents from files, local or `s3:`: text, JSONL in any compression, Parquet.

Memory: one file of text, one line of JSONL, one batch of Parquet rows.
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
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from components.corpus.documents import Document, Render, document_from_row
from components.corpus.settings import SourceSettings
from components.settings import Record, UserError, digest
from components.storage import file_sha256, resolve

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".parquet")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_ROWS_PER_BATCH = 256
_BUFFER_BYTES = 8 << 20


class ListedFile(Record):
    """A file of a corpus as it was when a run was resolved."""

    name: str
    """Relative to the path that named it, so that a corpus may move."""
    url: str
    stamp: str
    """Size and time of the last change on this machine, the store's ETag or the like elsewhere: another stamp, another file."""
    fingerprint: str
    """The content's hash on this machine; the store's own (ETag and size) elsewhere, which spares a download."""

    @property
    def path(self) -> str:
        return str(resolve(self.url)[1])

    def require_unchanged(self, where: str) -> None:
        """A UserError at `where` for a file that is gone, or is another one than was listed."""
        filesystem, path = resolve(self.url)
        try:
            stamp = _stamp(filesystem, path, filesystem.info(path))
        except FileNotFoundError as error:
            raise UserError(f"{where}: '{path}' vanished after this run began; put it back, or run again without it") from error
        if stamp != self.stamp:
            raise UserError(f"{where}: '{path}' changed after this run began; run again to read it as it is now")


def _stamp(filesystem: AbstractFileSystem, path: str, info: dict[str, Any]) -> str:
    if isinstance(filesystem, LocalFileSystem):
        state = Path(path).stat()
        return f"{state.st_size} {state.st_mtime_ns}"
    etag = info.get("ETag") or info.get("etag")
    return f"{info['size']} {etag.strip(chr(34))}" if etag else str(filesystem.ukey(path))


def listed_file(filesystem: AbstractFileSystem, path: str, name: str, info: dict[str, Any]) -> ListedFile:
    stamp = _stamp(filesystem, path, info)
    size, _, modified = stamp.partition(" ")
    local = isinstance(filesystem, LocalFileSystem)
    fingerprint = _local_sha256(path, int(size), int(modified)) if local else stamp
    return ListedFile(name=name, url=filesystem.unstrip_protocol(path), stamp=stamp, fingerprint=fingerprint)


@lru_cache(maxsize=1 << 16)
def _local_sha256(path: str, size: int, modified: int) -> str:
    return file_sha256(Path(path))


def find_files(paths: tuple[str, ...], where: str) -> list[ListedFile]:
    """The files that paths, folders and patterns name, sorted by name; a UserError at `where` for one that names nothing.

    With several paths a name starts with the path's place in the list.
    """
    found: dict[str, ListedFile] = {}
    for index, path in enumerate(paths):
        filesystem, bare = resolve(path)
        filesystem.invalidate_cache()
        try:
            base, matches = _matches(filesystem, bare)
        except Exception as error:  # each file system has its own exceptions; all mean the same to the user
            raise UserError(f"{where}: cannot read '{path}' ({type(error).__name__}: {error})") from error
        prefix = f"{index}/" if len(paths) > 1 else ""
        named = 0
        for match, info in sorted(matches.items()):
            relative = PurePosixPath(match).relative_to(base)
            if info["type"] != "file" or any(part.startswith(".") for part in relative.parts[:-1]):
                continue
            if relative.name.startswith(".") and match != bare:
                continue
            named += 1
            name = f"{prefix}{relative.as_posix()}"
            url = filesystem.unstrip_protocol(match)
            if url not in found:
                found[url] = listed_file(filesystem, match, name, info)
        if not named:
            raise UserError(f"{where}: '{path}' names no file; give an existing file, folder or glob pattern")
    return sorted(found.values(), key=lambda file: file.name)


def find_images(paths: tuple[str, ...]) -> tuple[ListedFile, ...]:
    """The image and Parquet files that paths, folders and patterns name, named by their URLs, sorted."""
    found: dict[str, ListedFile] = {}
    for path in paths:
        filesystem, bare = resolve(path)
        names = filesystem.find(bare) if filesystem.isdir(bare) else [n for n in filesystem.glob(bare) if filesystem.isfile(n)]
        matches = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        if not matches:
            raise UserError(
                f"corpus.paths: '{path}' names no image; accepted are files, folders and patterns with "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        for match in matches:
            url = filesystem.unstrip_protocol(match)
            found[url] = listed_file(filesystem, match, url, filesystem.info(match))
    return tuple(found[url] for url in sorted(found))


def files_identity(files: Sequence[ListedFile]) -> dict[str, Any]:
    return {"files": len(files), "content": digest([[file.name, file.fingerprint] for file in files])}


def read_file(file: ListedFile, source: SourceSettings, where: str, render: Render | None) -> Iterator[Document]:
    """The documents of one file, in its order; `where` is the source's place in the configuration."""
    file.require_unchanged(f"{where}.paths")
    with _readable(file, where):
        if file.name.endswith(".parquet"):
            yield from _read_parquet(file, source, where, render)
        elif _is_jsonl(file.name):
            yield from _read_jsonl(file, source, where, render)
        elif source.messages_column is not None:
            raise UserError(f"{where}.messages_column: '{file.path}' is neither JSONL nor Parquet and has no column")
        else:
            with _opened(file) as stream:
                text = stream.read()
            if text.strip():
                yield Document(name=file.name, text=text)


def read_rows(file: ListedFile, columns: Mapping[str, str], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the fields of each row of a Parquet or JSONL file; columns: that each must have, by the settings under
    `where` that name them."""
    file.require_unchanged(f"{where}.paths")
    with _readable(file, where):
        if file.name.endswith(".parquet"):
            yield from _parquet_rows(file, columns, where)
        elif _is_jsonl(file.name):
            for name, row in _jsonl_rows(file, where):
                for setting, column in columns.items():
                    if column not in row:
                        raise UserError(f"{where}.{setting}: '{column}' is not in {name}, which has {', '.join(sorted(row))}")
                yield name, row
        else:
            raise UserError(f"{where}.paths: '{file.path}' is neither JSONL nor Parquet and has no column")


@contextmanager
def _readable(file: ListedFile, where: str) -> Iterator[None]:
    """A UserError for content that is damaged or not text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{where}.paths: '{file.path}' is not UTF-8 text ({error.reason})") from error
    except (pa.ArrowException, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, _zstd().ZstdError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}.paths: '{file.path}' is damaged or not what its name says ({reason})") from error


def _matches(filesystem: AbstractFileSystem, bare: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The folder that names are relative to, and what is found, by path."""
    if filesystem.isfile(bare):
        return str(PurePosixPath(bare).parent), {bare: filesystem.info(bare)}
    if filesystem.isdir(bare):
        return bare, filesystem.find(bare, detail=True)
    parts = PurePosixPath(bare).parts
    literal = next((i for i, part in enumerate(parts) if any(magic in part for magic in "*?[")), len(parts) - 1)
    return str(PurePosixPath(*parts[:literal])), filesystem.glob(bare, detail=True)


def _is_jsonl(name: str) -> bool:
    return any(name.endswith(".jsonl" + compression) for compression in ("", *_COMPRESSIONS))


def _read_jsonl(file: ListedFile, source: SourceSettings, where: str, render: Render | None) -> Iterator[Document]:
    for name, row in _jsonl_rows(file, where):
        document = document_from_row(row, name, source, where, render)
        if document is not None:
            yield document


def _jsonl_rows(file: ListedFile, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the object of each line that is not blank."""
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}.paths: line {number} of '{file.path}' is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}.paths: line {number} of '{file.path}' is a {type(row).__name__}, not a JSON object")
            yield f"{file.name}:{number}", row


def _read_parquet(file: ListedFile, source: SourceSettings, where: str, render: Render | None) -> Iterator[Document]:
    setting = "text_column" if source.messages_column is None else "messages_column"
    column = source.messages_column or source.text_column
    for name, row in _parquet_rows(file, {setting: column}, where):
        document = document_from_row(row, name, source, where, render)
        if document is not None:
            yield document


def _parquet_rows(file: ListedFile, columns: Mapping[str, str], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """columns: by the settings that name them."""
    # Buffered and not read ahead: pages come one by one, where a whole column chunk would be held otherwise.
    filesystem, path = resolve(file.url)
    with pq.ParquetFile(path, filesystem=filesystem, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
        names = table.schema_arrow.names
        for setting, column in columns.items():
            if column not in names:
                raise UserError(f"{where}.{setting}: '{column}' is no column of '{file.path}', which has {', '.join(names)}")
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(columns.values())):
            for row in batch.to_pylist():
                yield f"{file.name}:{number}", row
                number += 1


@contextmanager
def _opened(file: ListedFile) -> Iterator[IO[str]]:
    """The file as text, decompressed by its suffix. A file that ends too early raises EOFError."""
    filesystem, path = resolve(file.url)
    with filesystem.open(path, "rb") as raw:
        suffix = PurePosixPath(file.name).suffix
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
