"""The standard library of the running interpreter as a corpus: real text on every machine."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from components.corpus.documents import Document
from components.corpus.listing import ListedFile, listed_file

# Tests are repetitive fixtures, site-packages is whatever the user installed, and the codec tables of `encodings` are
# hundreds of near-identical maps of numbers: a held-out table would be memorised from its twin in the training text.
STDLIB_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
)
# Written by the build of the interpreter: full of local paths and flags, different on every machine.
STDLIB_EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")


def standard_library_files() -> list[ListedFile]:
    """The source files of the running interpreter's standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    prefix = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = []
    for folder, folders, names in os.walk(root):
        # Pruned here and not left out afterwards: site-packages may hold a hundred times more files.
        folders[:] = [name for name in folders if name not in STDLIB_EXCLUDED_FOLDERS]
        for name in names:
            if name.endswith(".py") and not name.startswith(STDLIB_EXCLUDED_PREFIXES):
                path = Path(folder, name)
                found.append((f"{prefix}/{path.relative_to(root).as_posix()}", path))
    local = LocalFileSystem()
    return [listed_file(local, str(path), name, {}) for name, path in sorted(found)]


def read_standard_library(files: Sequence[ListedFile] | None = None) -> Iterator[Document]:
    """The standard library's modules as documents; undecodable and empty files are left out."""
    for file in standard_library_files() if files is None else files:
        file.require_unchanged("corpus.source")
        try:
            text = Path(file.path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules declare another encoding on purpose
            continue
        if text.strip():
            yield Document(name=file.name, text=text)
