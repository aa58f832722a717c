"""Scratch files beside what they will become, and what killed processes left of them."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

import psutil

STAGED_PREFIX = ".staged-"  # a leftover of a killed process under this prefix is never read
_FORGOTTEN_SECONDS = 86_400
"""After so long without a write, a file whose process cannot be looked up is nobody's."""


@contextmanager
def staged_beside(path: Path) -> Iterator[Path]:
    """A scratch file on the same file system as `path`, removed on the way out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f"{_processes()}-{os.getpid()}-{_started(os.getpid())}"
    staged = path.parent / f"{STAGED_PREFIX}{owner}-{uuid.uuid4().hex[:8]}"
    try:
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def sweep_folder(folder: Path) -> None:
    """Remove what dead processes left half-written directly under a folder.

    A PID says who is alive only where it was given: files of other machines, containers and boots go when they have not
    been written to for a day.
    """
    for staged in folder.glob(f"{STAGED_PREFIX}*"):
        with suppress(FileNotFoundError):
            if not _may_be_written(staged):
                staged.unlink()


def _may_be_written(staged: Path) -> bool:
    match staged.name.removeprefix(STAGED_PREFIX).split("-"):
        case [processes, pid, started, _] if processes == _processes():
            return psutil.pid_exists(int(pid)) and _started(int(pid)) == started
    return time.time() - staged.stat().st_mtime < _FORGOTTEN_SECONDS


@cache
def host_identity() -> str:
    """Names the process table that a process number belongs to: host name, boot and PID namespace."""
    parts = [platform.node()]
    with suppress(OSError):  # not Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text()[:8], os.readlink("/proc/self/ns/pid").strip("pid:[]")]
    return "/".join(parts)


def _processes() -> str:
    """The same as part of a file's name."""
    return sha256(host_identity().encode()).hexdigest()[:12]


def _started(pid: int) -> str:
    """When a process was started, in ticks since the boot: a PID that is used again does not keep its files."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:  # not Linux, or no such process
        return ""
