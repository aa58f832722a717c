"""Random access: the activations of given tokens, by document and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from components.activations.manifest import Manifest, Shard
from components.activations.shuffle import bucket_of
from components.activations.values import Values
from components.settings import UserError

_SHARDS_KEPT = 32


@dataclass(frozen=True, eq=False)
class ActivationLookup:
    """Finds tokens in a dataset without an index: which shard holds a token is a hash of it. Of that shard the documents
    and positions are read (12 bytes a row, kept for the last few shards), and then the token's own row."""

    values: Values

    @property
    def manifest(self) -> Manifest:
        return self.values.manifest

    def __call__(self, documents: Sequence[int], positions: Sequence[int], column: str) -> Tensor:
        """The column's rows of these tokens, `[n, d_in]` of a hook point, in the order asked for.

        Raises a UserError that names the first token that is not in the dataset.
        """
        wanted = np.array(documents, dtype=np.int64), np.array(positions, dtype=np.int32)
        if column not in self.manifest.layout.column_bytes:
            self.manifest.column(column)  # says which there are
        buckets = bucket_of(*wanted, len(self.manifest.shards), self.manifest.seed)
        places: list[tuple[Shard, int]] = [(self.manifest.shards[bucket], -1) for bucket in buckets]
        for bucket in np.unique(buckets).tolist():
            shard = self.manifest.shards[bucket]
            index = _sorted_keys(self.values, bucket)
            for number in np.flatnonzero(buckets == bucket).tolist():
                document, position = int(wanted[0][number]), int(wanted[1][number])
                row = index.find(document, position)
                if row is None:
                    raise UserError(f"document {document}, position {position}: this token is not in {self.values.url}")
                places[number] = (shard, row)
        return self.manifest.layout.tensor(column, self.values.read_rows(places, column))


@dataclass(frozen=True)
class _Keys:
    keys: np.ndarray
    rows: np.ndarray

    def find(self, document: int, position: int) -> int | None:
        key = _key(np.array([document]), np.array([position]))[0]
        place = int(np.searchsorted(self.keys, key))
        return int(self.rows[place]) if place < len(self.keys) and self.keys[place] == key else None


def _key(documents: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return documents.astype(np.int64) << 32 | positions.astype(np.int64)


@lru_cache(maxsize=_SHARDS_KEPT)
def _sorted_keys(values: Values, bucket: int) -> _Keys:
    shard = values.manifest.shards[bucket]

    def column(name: str, kind: type) -> np.ndarray:
        width = values.manifest.layout.column_bytes[name]
        parts = [values.read(shard, group, name) for group in range(len(shard.groups[name]))]
        return np.concatenate([np.empty((0, width), dtype=np.uint8), *parts]).view(kind).reshape(-1)

    keys = _key(column("document", np.int64), column("position", np.int32))
    rows = np.argsort(keys)
    return _Keys(keys[rows], rows)
