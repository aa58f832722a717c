"""Files under a root that is a local path, `file:` or `s3:`: whole or absent, never half-written.

Everything is staged on local scratch and put in one piece. Writing straight into an object-store stream is avoided on
purpose: a stream that an exception closes leaves a valid but truncated object behind.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import psutil
from filelock import BaseFileLock, FileLock, Timeout
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from components.settings import UserError

logger = logging.getLogger(__name__)

_STAGED_PREFIX = ".staged-"  # a leftover of a killed process under this prefix is never read


def join(url: str, *parts: str) -> str:
    """`url/part/part`, for paths and URLs alike."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def resolve(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system behind `url` and the path on it."""
    return fsspec.core.url_to_fs(url)


def is_local(url: str) -> bool:
    return isinstance(resolve(url)[0], LocalFileSystem)


def local_path(url: str) -> Path:
    """The local path of `url`; an assertion fails where it is not local."""
    filesystem, path = resolve(url)
    assert isinstance(filesystem, LocalFileSystem), f"{url} is not on this machine"
    return Path(path)


def exists(url: str) -> bool:
    filesystem, path = resolve(url)
    filesystem.invalidate_cache()
    return filesystem.isfile(path)


def read_bytes(url: str) -> bytes:
    filesystem, path = resolve(url)
    return filesystem.cat_file(path)


def read_json(url: str) -> Any:
    return json.loads(read_bytes(url))


def read_json_if_present(url: str) -> Any | None:
    try:
        return read_json(url)
    except FileNotFoundError:
        return None


@contextmanager
def whole_file(url: str) -> Iterator[Path]:
    """A scratch path to write to; on a clean exit its content is at `url` in one step, on an exception nothing is."""
    filesystem, path = resolve(url)
    if isinstance(filesystem, LocalFileSystem):
        with _staged_beside(Path(path)) as staged:
            yield staged
            _synchronise(staged)
            os.replace(staged, path)
        return
    with tempfile.TemporaryDirectory(prefix="sae-staged-") as scratch:
        staged = Path(scratch) / "file"
        yield staged
        filesystem.put_file(str(staged), path)


def put_bytes(content: bytes, url: str) -> None:
    """As `whole_file`, from memory."""
    filesystem, path = resolve(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, content)
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
    filesystem, path = resolve(url)
    if isinstance(filesystem, LocalFileSystem):
        with _staged_beside(Path(path)) as staged:
            staged.write_bytes(content)
            _synchronise(staged)
            try:
                os.link(staged, path)
            except FileExistsError:
                return False
        return True
    try:
        filesystem.pipe_file(path, content, mode="create")
    except OSError:  # SeaweedFS's refusal reaches us as EINVAL, others' as FileExistsError
        if not exists(url):
            raise
        return False
    return True


@contextmanager
def local_copies(url: str, names: Sequence[str]) -> Iterator[Path]:
    """A folder on this machine that holds copies of these files under `url`, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="sae-copies-") as scratch:
        folder = Path(scratch) / url.rstrip("/").rsplit("/", 1)[-1]
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(read_bytes(join(url, name)))
        yield folder


def list_names(url: str) -> list[str]:
    """Sorted names of the files directly under `url`; none where it does not exist."""
    filesystem, path = resolve(url)
    filesystem.invalidate_cache()
    try:
        entries = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return []
    # SeaweedFS lists an emptied prefix as an entry of itself.
    files = (entry["name"] for entry in entries if entry["type"] == "file" and entry["name"].rstrip("/") != path.rstrip("/"))
    names = (name.rsplit("/", 1)[-1] for name in files)
    return sorted(name for name in names if not name.startswith(_STAGED_PREFIX))


def delete(url: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none."""
    filesystem, path = resolve(url)
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


@contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Hold the only right on this machine to work on `url`; waits while another process holds it.

    The operating system releases it when its holder dies. Under `s3:` there is no such lock, and nothing is held.
    """
    filesystem, path = resolve(url)
    if not isinstance(filesystem, LocalFileSystem):
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    if not _acquired_at_once(lock):
        logger.info("waiting for another process that works on %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _acquired_at_once(lock: BaseFileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def sweep(url: str) -> None:
    """Remove what killed processes of this machine left half-written directly under a local folder."""
    filesystem, path = resolve(url)
    if not isinstance(filesystem, LocalFileSystem):
        return  # an upload that was not finished never became an object
    for staged in Path(path).glob(f"{_STAGED_PREFIX}{platform.node()}-*"):
        if not psutil.pid_exists(int(staged.name.split("-")[-2])):
            staged.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        state = sha256()
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def require_writable(url: str, field: str) -> None:
    """Raise a UserError naming `field` unless a file can be written and removed under `url`."""
    probe = join(url, ".write-probe")
    try:
        put_bytes(b"", probe)
        delete(probe)
    except Exception as error:  # each file system has its own exceptions; all mean the same to the user
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{field}: cannot write to '{url}' ({reason}); name a folder or s3:// prefix that you own") from error


@contextmanager
def _staged_beside(path: Path) -> Iterator[Path]:
    """A scratch file on the same file system as `path`, removed on the way out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / f"{_STAGED_PREFIX}{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")
