"""A bounded folder of what was read from an object store, so that a second epoch comes from the local disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from components.storage import local_path, put_bytes


@dataclass(frozen=True, kw_only=True)
class CachePlace:
    """Where a cache is and how large it may be; `open` makes the folder."""

    folder: str
    limit: int
    """Bytes."""

    def open(self) -> DiskCache:
        return DiskCache(self.folder, self.limit)


class DiskCache:
    """Files of immutable content under a folder; the least recently used ones go when their sum passes `limit` bytes.

    Any number of threads and processes may share the folder. What is cut short or gone is fetched again.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = local_path(folder), limit
        self._lock = threading.Lock()
        self._added = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._evict()

    def get(self, key: str, size: int, fetch: Callable[[], bytes]) -> bytes:
        """The `size` bytes that `key` names: from the folder, or fetched and kept."""
        path = self._path(key)
        with suppress(FileNotFoundError):
            content = path.read_bytes()
            if len(content) == size:
                with suppress(FileNotFoundError):
                    os.utime(path)  # its last use
                return content
        content = fetch()
        if size <= self.limit:
            self._make_room(size)
            put_bytes(content, str(path))
        return content

    def drop(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        """Of a hash: what a key says comes from a manifest, and must not lead out of the folder."""
        return self.folder / sha256(key.encode("utf-8")).hexdigest()

    def _make_room(self, size: int) -> None:
        """Look at the folder now and then, not at every file: what was added since the last look is known."""
        with self._lock:
            self._added += size
            if self._total + self._added > self.limit:
                self._evict(size)

    def _evict(self, wanted: int = 0) -> None:
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        # Down to nine tenths, so that the next file does not bring the next look.
        goal = self.limit if total + wanted <= self.limit else int(0.9 * self.limit)
        for _, size, path in sorted(found):
            if total + wanted <= goal:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._total, self._added = total, wanted
