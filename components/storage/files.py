"""Files under a root that is a local path, `file:` or `s3:`: whole or absent, never half-written.

Everything is staged on local scratch and put in one piece. Writing straight into an object-store stream is avoided on
purpose: a stream that an exception closes leaves a valid but truncated object behind.

A store that is away for a while (a restart, a 503, "slow down") is waited for; see `components/storage/retries.py`.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from components.redaction import redacted
from components.settings import UserError
from components.storage.addresses import LOCAL_SCHEMES, scheme_of, unknown_scheme
from components.storage.retries import patiently
from components.storage.staging import STAGED_PREFIX, staged_beside, sweep_folder

_PARALLEL_READS = 16
_IOV_MAX = 1024  # buffers in one preadv; POSIX guarantees 16, Linux has 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)


def join(url: str, *parts: str) -> str:
    """`url/part/part`, for paths and URLs alike."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def resolve(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system behind `url` and the path on it; a UserError for one that is none of ours.

    A local path is none of fsspec's chains, whatever its name (`a::b`), and no address may ask another network.
    """
    if scheme_of(url) in LOCAL_SCHEMES:
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    reason = unknown_scheme(url)
    if reason is not None:
        raise UserError(f"address: {redacted(reason)}")
    return fsspec.core.url_to_fs(url)


def is_local(url: str) -> bool:
    return isinstance(resolve(url)[0], LocalFileSystem)


def local_path(url: str) -> Path:
    """The local path of `url`; an assertion fails where it is not local."""
    filesystem, path = resolve(url)
    assert isinstance(filesystem, LocalFileSystem), f"{url} is not on this machine"
    return Path(path)


def _call(url: str, operation: str, *arguments: Any, **named: Any) -> Any:
    """`filesystem.operation(path, ...)` for the file system and path of `url`, waiting for a store that is away.

    A path through something that is no folder, or with a name that no folder could have, is a file that is not there.
    """
    filesystem, path = resolve(url)
    filesystem.invalidate_cache()
    try:
        return patiently(filesystem, operation, path, *arguments, **named)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise FileNotFoundError(error.errno, error.strerror, path) from error
        raise


def exists(url: str) -> bool:
    """Whether there is a file or a folder at `url`. (fsspec's own `isfile` takes a store that is away for a no.)"""
    try:
        _call(url, "info")
    except FileNotFoundError:
        return False
    return True


def read_bytes(url: str) -> bytes:
    return _call(url, "cat_file")


def read_range(url: str, start: int, length: int) -> bytes:
    """`length` bytes from byte `start` on; an EOFError that names the file where it is shorter."""
    content: bytes = b"" if length == 0 else _call(url, "cat_file", start=start, end=start + length)
    if len(content) != length:
        raise EOFError(f"{url} ends before byte {start + length}")
    return content


def fill(path: str, targets: Sequence[memoryview], start: int) -> None:
    """Fill the targets, one after the other, with a local file's bytes from `start` on; an EOFError where it is shorter.

    One `preadv` may give less than it was asked for; Linux never gives more than 2,147,479,552 bytes.
    """
    left = deque(target for target in targets if len(target))
    with open(path, "rb", buffering=0) as stream:
        while left:
            got = os.preadv(stream.fileno(), list(islice(left, _IOV_MAX)), start)
            if got == 0:
                raise EOFError(f"{path} ends before byte {start + sum(map(len, left))}")
            start += got
            while left and got >= len(left[0]):
                got -= len(left.popleft())
            if got:
                left[0] = left[0][got:]


def read_ranges(ranges: Sequence[tuple[str, int, memoryview]]) -> None:
    """Fill each memoryview with the bytes of its file from the given one on; in parallel where that helps.

    An EOFError that names the file where one is shorter.
    """

    def read(url: str, start: int, target: memoryview) -> None:
        if is_local(url):
            fill(str(local_path(url)), [target], start)
        else:
            target[:] = read_range(url, start, len(target))

    if all(is_local(url) for url, _, _ in ranges):
        for part in ranges:
            read(*part)
        return
    with ThreadPoolExecutor(_PARALLEL_READS) as threads:
        list(threads.map(read, *zip(*ranges, strict=True)))


def read_json(url: str) -> Any:
    return json.loads(read_bytes(url))


@contextmanager
def whole_file(url: str) -> Iterator[Path]:
    """A scratch path to write to; on a clean exit its content is at `url` in one step, on an exception nothing is."""
    with scratch(url) as staged:
        yield staged
        put_file(staged, url)


def put_file(staged: Path, url: str) -> None:
    """Put a scratch file at `url` in one step, in place of what is there."""
    if is_local(url):
        _synchronise(staged)
        os.replace(staged, local_path(url))
    else:
        filesystem, path = resolve(url)
        patiently(filesystem, "put_file", str(staged), path)


def put_file_once(staged: Path, url: str) -> bool:
    """Put a scratch file at `url` if nothing is there; False when another writer was first."""
    if is_local(url):
        _synchronise(staged)
        try:
            os.link(staged, local_path(url))
        except FileExistsError:
            return False
        return True
    filesystem, path = resolve(url)
    return _created(url, filesystem, "put_file", str(staged), path)


@contextmanager
def scratch(url: str) -> Iterator[Path]:
    """A path to write what will be put at `url`: beside it on a local disk, in a temporary folder otherwise."""
    with _naming_a_full_disk(url):
        if is_local(url):
            with staged_beside(local_path(url)) as staged:
                yield staged
        else:
            with tempfile.TemporaryDirectory(prefix="sae-staged-") as folder:
                yield Path(folder) / "file"


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The file at `url` on this machine: itself, or a copy for as long as the block."""
    if is_local(url):
        yield local_path(url)
        return
    with tempfile.TemporaryDirectory(prefix="sae-copies-") as folder:
        copy = Path(folder) / url.rsplit("/", 1)[-1]
        filesystem, path = resolve(url)
        patiently(filesystem, "get_file", path, str(copy))
        yield copy


@contextmanager
def _naming_a_full_disk(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        folder = local_path(url).parent if is_local(url) else tempfile.gettempdir()
        raise UserError(
            f"storage.root: the disk of '{folder}' is full and '{url}' could not be written; free some space and run "
            "again, which continues from here"
        ) from error


def put_bytes(content: bytes, url: str) -> None:
    """As `whole_file`, from memory."""
    if not is_local(url):
        _call(url, "pipe_file", content)
        return
    with whole_file(url) as staged:
        staged.write_bytes(content)


def put_json(value: Any, url: str) -> None:
    put_bytes(_json_bytes(value), url)


def put_json_once(value: Any, url: str) -> bool:
    """Commit `value` at `url` if nothing is there; False when another writer was first.

    An exclusive link on a local disk, `If-None-Match: *` on S3.
    """
    content = _json_bytes(value)
    if is_local(url):
        with scratch(url) as staged:
            staged.write_bytes(content)
            return put_file_once(staged, url)
    filesystem, path = resolve(url)
    # A put whose answer was lost is sent again and refused then: what counts is whose content is there.
    return _created(url, filesystem, "pipe_file", path, content) or read_bytes(url) == content


def _created(url: str, filesystem: AbstractFileSystem, operation: str, *arguments: Any) -> bool:
    """Put with `If-None-Match: *`; False where something is there already."""
    try:
        patiently(filesystem, operation, *arguments, mode="create")
    except OSError:  # SeaweedFS's refusal reaches us as EINVAL, others' as FileExistsError
        if not exists(url):
            raise
        return False
    return True


@contextmanager
def local_copies(url: str, names: Sequence[str]) -> Iterator[Path]:
    """A folder on this machine that holds copies of these files under `url`, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="sae-copies-") as parent:
        folder = Path(parent) / url.rstrip("/").rsplit("/", 1)[-1]
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(read_bytes(join(url, name)))
        yield folder


def list_names(url: str) -> list[str]:
    """Sorted names of the files directly under `url`; none where it does not exist."""
    return [name for name, kind in _entries(url) if kind == "file"]


def list_folders(url: str) -> list[str]:
    """Sorted names of the folders directly under `url`; none where it does not exist."""
    return [name for name, kind in _entries(url) if kind == "directory"]


def _entries(url: str) -> list[tuple[str, str]]:
    path = resolve(url)[1]
    try:
        entries = _call(url, "ls", detail=True)
    except FileNotFoundError:
        return []
    # SeaweedFS lists an emptied prefix as an entry of itself.
    kept = (entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/"))
    found = ((entry["name"].rstrip("/").rsplit("/", 1)[-1], _kind(entry)) for entry in kept)
    return sorted((name, kind) for name, kind in found if not name.startswith(STAGED_PREFIX))


def _kind(entry: dict[str, Any]) -> str:
    """A local link is what it leads to: fsspec calls it "other"."""
    if not entry.get("islink"):
        return str(entry["type"])
    return "directory" if os.path.isdir(entry["name"]) else "file" if os.path.isfile(entry["name"]) else "other"


def size(url: str) -> int:
    """Bytes of a file; FileNotFoundError where there is none."""
    return int(_call(url, "info")["size"])


def fingerprint(url: str) -> str:
    """Another text whenever a file has been written to; FileNotFoundError where there is none."""
    if is_local(url):
        status = os.stat(local_path(url))
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
    info = _call(url, "info")
    return " ".join(str(info.get(name)) for name in ("size", "ETag", "LastModified", "created"))


def delete(url: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none."""
    if is_local(url) and local_path(url).is_symlink():
        local_path(url).unlink()  # what it leads to is not ours
        return
    try:
        if exists(url):
            _call(url, "rm", recursive=True)
    except FileNotFoundError:  # another process was quicker
        if exists(url):
            raise


def sweep(url: str) -> None:
    """Remove what killed processes of this machine left half-written directly under a local folder."""
    if is_local(url):  # elsewhere, an upload that was not finished never became an object
        sweep_folder(local_path(url))


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        state = sha256()
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def _synchronise(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")
