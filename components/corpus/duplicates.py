"""Documents that were seen before: equal ones by a fingerprint, nearly equal ones by MinHash and locality-sensitive hashing.

The index is a temporary SQLite database, which SQLite itself moves to scratch where it outgrows its cache and removes with
the connection: memory is bounded, whatever the corpus. Disk: about 30 bytes for each document, with near-duplicates about
`4 x permutations + 600`.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from components.corpus.settings import NearDuplicateSettings

_CACHE_KIB = 32 * 1024
_SEED = 0x5AE
_RECALL = 0.95
# A letter of a script that is written without spaces is a word of its own.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """128 bits of a text, and its MinHash signature `[permutations]` where near-duplicates are looked for."""

    exact: bytes
    signature: np.ndarray | None


class Duplicates:
    """Every document that was taken so far."""

    def __init__(self, settings: NearDuplicateSettings | None) -> None:
        self.settings = settings
        self._database = sqlite3.connect("", isolation_level=None)
        for pragma in (f"cache_size=-{_CACHE_KIB}", "journal_mode=off", "synchronous=off"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE exact (fingerprint BLOB PRIMARY KEY) WITHOUT ROWID")
        if settings is not None:
            self._rows = _rows_per_band(settings)
            self._database.execute("CREATE TABLE bands (key INTEGER, id INTEGER, PRIMARY KEY (key, id)) WITHOUT ROWID")
            self._database.execute("CREATE TABLE signatures (id INTEGER PRIMARY KEY, signature BLOB)")

    def close(self) -> None:
        self._database.close()

    def fingerprints(self, texts: Sequence[str]) -> list[Fingerprint]:
        exact = [blake2b(text.encode("utf-8"), digest_size=16).digest() for text in texts]
        if self.settings is None:
            return [Fingerprint(exact=value, signature=None) for value in exact]
        from rensa import RMinHash

        shingles = [_shingles(text, self.settings.shingle_words) for text in texts]
        rows = RMinHash.digests_from_token_sets(shingles, self.settings.permutations, _SEED)
        return [
            Fingerprint(exact=value, signature=np.array(row, dtype=np.uint32)) for value, row in zip(exact, rows, strict=True)
        ]

    def is_copy(self, fingerprint: Fingerprint) -> bool:
        """Whether a document with this very text was taken."""
        found = self._database.execute("SELECT 1 FROM exact WHERE fingerprint = ?", (fingerprint.exact,))
        return found.fetchone() is not None

    def find(self, fingerprint: Fingerprint) -> str | None:
        """`"exact"` or `"near"` for what resembles a document that was taken, None for what is new."""
        if self.is_copy(fingerprint):
            return "exact"
        if fingerprint.signature is None:
            return None
        assert self.settings is not None
        keys = self._keys(fingerprint.signature)
        slots = ",".join("?" * len(keys))
        candidates = self._database.execute(
            f"SELECT signature FROM signatures WHERE id IN (SELECT id FROM bands WHERE key IN ({slots}))", keys
        )
        for (stored,) in candidates:
            equal = np.count_nonzero(np.frombuffer(stored, np.uint32) == fingerprint.signature)
            if equal >= self.settings.threshold * self.settings.permutations:
                return "near"
        return None

    def take(self, fingerprint: Fingerprint) -> None:
        """Remember a document."""
        self._database.execute("INSERT OR IGNORE INTO exact VALUES (?)", (fingerprint.exact,))
        if fingerprint.signature is None:
            return
        row = self._database.execute("INSERT INTO signatures (signature) VALUES (?)", (fingerprint.signature.tobytes(),))
        pairs = [(key, row.lastrowid) for key in set(self._keys(fingerprint.signature))]
        self._database.executemany("INSERT INTO bands VALUES (?, ?)", pairs)

    def _keys(self, signature: np.ndarray) -> list[int]:
        """One 64-bit key for each band of the signature; two documents are compared where they share one."""
        bands = len(signature) // self._rows
        content = signature[: bands * self._rows].astype("<u4").tobytes()
        width = 4 * self._rows
        return [
            int.from_bytes(
                blake2b(band.to_bytes(2, "little") + content[band * width : (band + 1) * width], digest_size=8).digest(),
                "little",
                signed=True,
            )
            for band in range(bands)
        ]


def near_duplicates_identity(settings: NearDuplicateSettings | None) -> dict[str, Any] | None:
    """What decides which documents are near-duplicates, the library's algorithm included."""
    if settings is None:
        return None
    from rensa import RMinHash

    return {**settings.model_dump(), "algorithm": f"rensa R-MinHash {RMinHash.ALGORITHM_VERSION}"}


def _shingles(text: str, words: int) -> list[str]:
    found = _WORD.findall(text.lower())
    if len(found) <= words:
        return [" ".join(found) or text]
    return [" ".join(found[start : start + words]) for start in range(len(found) - words + 1)]


def _rows_per_band(settings: NearDuplicateSettings) -> int:
    """The longest band with which a pair at the threshold is compared with probability `_RECALL`.

    A pair of similarity J shares one of b bands of r rows with probability `1 - (1 - J^r)^b` (Leskovec, Rajaraman and
    Ullman, "Mining of Massive Datasets", section 3.4.2).
    """
    rows = 1
    for longer in range(1, settings.permutations + 1):
        if 1 - (1 - settings.threshold**longer) ** (settings.permutations // longer) < _RECALL:
            break
        rows = longer
    return rows
