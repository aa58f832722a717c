"""Whether there is room, and leave to write, before somebody relies on it."""

from __future__ import annotations

import shutil
from pathlib import Path

from components.settings import UserError
from components.storage.files import delete, is_local, join, local_path, put_bytes
from components.storage.retries import patience

PROBE_SECONDS = 5.0
"""How long a store may be away before a run that is about to start says so."""


def free_bytes(url: str) -> int | None:
    """What is left on the disk of a local folder (or of its nearest parent that exists); None for an object store."""
    return shutil.disk_usage(nearest_folder(local_path(url))).free if is_local(url) else None


def nearest_folder(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def require_writable(url: str, field: str, seconds: float = PROBE_SECONDS) -> None:
    """Raise a UserError naming `field` unless a file can be written and removed under `url`, tried for `seconds`."""
    probe = join(url, ".write-probe")
    try:
        with patience(seconds):
            put_bytes(b"", probe)
            delete(probe)
    except Exception as error:  # each file system has its own exceptions; all mean the same to the user
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{field}: cannot write to '{url}' ({reason}); name a folder or s3:// prefix that you own") from error
