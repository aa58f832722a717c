"""Local folders: can a run write to them, does the file system do what commits rest on, and is there room?"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from components import storage
from components.doctor.check import Check, explained, human_bytes

LITTLE_BYTES = 2_000_000_000
"""Free space under which there is a warning where no configuration says what is needed."""
_NOTHING_BYTES = 100_000_000
_SPARE_BYTES = 1_000_000_000  # checkpoints, reports, MLflow's database and artifacts


def folder_checks(root: str) -> Iterator[Check]:
    """What is needed of the folder of a local storage root; nothing is left in it, and it is not made."""
    folder = storage.nearest_folder(storage.local_path(root))
    shown = str(folder) if folder == storage.local_path(root) else f"{folder}, in which a run makes {root}"
    try:
        with tempfile.TemporaryDirectory(prefix=".sae-doctor-", dir=folder) as made:
            probe, link = Path(made, "probe"), Path(made, "link")
            probe.write_bytes(b"probe")
            yield Check("storage", "write", "ok", shown)
            try:
                os.link(probe, link)
                with FileLock(f"{probe}.lock", timeout=0):
                    pass
                yield Check("storage", "commit", "ok", "hard links and file locks work")
            except (OSError, NotImplementedError) as error:
                advice = (
                    "Choose a storage.root on another file system: two runs at once could overwrite each other's work here."
                )
                yield Check("storage", "commit", "failure", f"no hard links or file locks: {explained(error)}", advice)
    except OSError as error:
        advice = f"Give yourself the right to write to {folder}, or name another storage.root."
        yield Check("storage", "write", "failure", f"{folder}: {explained(error)}", advice)


def space_check(folder: str, needed: int | None, field: str = "storage.root") -> Check:
    """Free bytes on the disk of a local folder against what a run needs there; `needed` is None where nobody knows."""
    place = storage.nearest_folder(Path(folder))
    free = shutil.disk_usage(place).free
    found = f"{human_bytes(free)} free for {field} ({place})"
    room = f"Free some space, or point {field} to a larger disk"
    if needed is None:
        if free >= LITTLE_BYTES:
            return Check("storage", "disk", "ok", found)
        return Check("storage", "disk", "failure" if free < _NOTHING_BYTES else "warning", found, f"{room}.")
    found = f"{found}, {human_bytes(needed)} needed"
    if free < needed:
        return Check("storage", "disk", "failure", found, f"{room}: the run would stop with a full disk.")
    if free < needed + _SPARE_BYTES:
        return Check("storage", "disk", "warning", found, f"{room}: little is left for checkpoints and MLflow.")
    return Check("storage", "disk", "ok", found)
