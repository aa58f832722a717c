"""The files of a corpus: which ones paths, folders and patterns name, and what identifies each.

Links are followed, to files and to folders: the Hub's cache and many collections are made of them, and what is listed is what
is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from components.settings import Record, UserError, digest
from components.storage import file_sha256, resolve

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".parquet")


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


def find_files(paths: Sequence[str], where: str) -> list[ListedFile]:
    """The files that paths, folders and patterns name, sorted by name; a UserError at `where` for one that names nothing.

    With several paths a name starts with the path's place in the list.
    """
    found: dict[str, ListedFile] = {}
    for index, path in enumerate(paths):
        prefix = f"{index}/" if len(paths) > 1 else ""
        named = _named(path, where)
        if not named:
            raise UserError(f"{where}: '{path}' names no file; give an existing file, folder or glob pattern")
        for match, (filesystem, relative, info) in named.items():
            url = filesystem.unstrip_protocol(match)
            if url not in found:
                found[url] = _listed(filesystem, match, f"{prefix}{relative}", info, where)
    return sorted(found.values(), key=lambda file: file.name)


def find_images(paths: Sequence[str]) -> tuple[ListedFile, ...]:
    """The image and Parquet files that paths, folders and patterns name, named by their URLs, sorted."""
    where, found = "corpus.paths", {}
    for path in paths:
        named = {name: what for name, what in _named(path, where).items() if name.lower().endswith(IMAGE_SUFFIXES)}
        if not named:
            raise UserError(
                f"{where}: '{path}' names no image; accepted are files, folders and patterns with {', '.join(IMAGE_SUFFIXES)}"
            )
        for match, (filesystem, _, info) in named.items():
            url = filesystem.unstrip_protocol(match)
            found[url] = _listed(filesystem, match, url, info, where)
    return tuple(found[url] for url in sorted(found))


def linked_folder(folder: Path) -> Path | None:
    """A link to a folder somewhere under `folder`, None where there is none."""
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            if not name.startswith(".") and Path(parent, name).is_symlink():
                return Path(parent, name)
    return None


def files_identity(files: Sequence[ListedFile]) -> dict[str, Any]:
    return {"files": len(files), "content": digest([[file.name, file.fingerprint] for file in files])}


def _named(path: str, where: str) -> dict[str, tuple[AbstractFileSystem, str, dict[str, Any]]]:
    """What a path names, in order: (file system, name relative to the path, info) by path. Hidden ones are passed over."""
    try:
        filesystem, bare = resolve(path)
        if isinstance(filesystem, LocalFileSystem):
            filesystem = _LinksFollowed()
            _require_less_than_everything(path, bare, where)
        filesystem.invalidate_cache()
        base, matches = _matches(filesystem, bare)
    except UserError:
        raise
    except Exception as error:  # each file system has its own exceptions; all mean the same to the user
        raise UserError(f"{where}: cannot read '{path}' ({type(error).__name__}: {error})") from error
    named = {}
    for match, info in sorted(matches.items()):
        relative = PurePosixPath(match).relative_to(base)
        hidden = any(part.startswith(".") for part in relative.parts[:-1]) or (relative.name.startswith(".") and match != bare)
        if info["type"] == "file" and not hidden:
            named[match] = (filesystem, relative.as_posix(), info)
        elif info.get("islink") and not hidden and info["type"] != "directory" and not os.path.exists(match):
            raise UserError(f"{where}: '{match}' is a link to '{info['destination']}', which is not there; remove or mend it")
    return named


def _listed(filesystem: AbstractFileSystem, path: str, name: str, info: dict[str, Any], where: str) -> ListedFile:
    try:
        return listed_file(filesystem, path, name, info)
    except OSError as error:
        raise UserError(f"{where}: '{path}' cannot be read ({error.strerror or error}); give a file that can") from error


def _matches(filesystem: AbstractFileSystem, bare: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The folder that names are relative to, and what is found, by path."""
    if filesystem.isfile(bare):
        return str(PurePosixPath(bare).parent), {bare: filesystem.info(bare)}
    if filesystem.isdir(bare):
        return bare, filesystem.find(bare, detail=True)
    parts = PurePosixPath(bare).parts
    literal = next((i for i, part in enumerate(parts) if any(magic in part for magic in "*?[")), len(parts) - 1)
    return str(PurePosixPath(*parts[:literal])), filesystem.glob(bare, detail=True)


def _require_less_than_everything(path: str, bare: str, where: str) -> None:
    """Reading and hashing all that somebody has is never what they meant."""
    home, folder = Path.home().resolve(), Path(bare).resolve()
    if folder == home or folder in home.parents:
        raise UserError(f"{where}: '{path}' is your whole home folder, or holds it; name the folder of the texts in it")


class _LinksFollowed(LocalFileSystem):
    """Local files as `open` sees them: a link is what it leads to. One that leads back up is passed over."""

    cachable = False

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
        try:
            entries = super().ls(path, detail=True, **kwargs)
        except PermissionError as error:  # fsspec's walk leaves out in silence what it cannot list
            raise UserError(f"corpus: the folder '{path}' cannot be listed ({error.strerror})") from error
        kept = [self._followed(entry, path) if entry["islink"] else entry for entry in entries if not _is_hidden_folder(entry)]
        return [entry if detail else entry["name"] for entry in kept if entry is not None]

    def _followed(self, entry: dict[str, Any], folder: str) -> dict[str, Any] | None:
        try:
            led_to = self.info(entry["name"])
        except OSError:  # to nothing, or to itself
            return entry
        real = Path(entry["name"]).resolve()
        above = {Path(folder).resolve(), *(parent.resolve() for parent in (Path(folder), *Path(folder).parents))}
        return None if led_to["type"] == "directory" and real in above else led_to


def _is_hidden_folder(entry: dict[str, Any]) -> bool:
    return entry["type"] == "directory" and PurePosixPath(entry["name"]).name.startswith(".")
