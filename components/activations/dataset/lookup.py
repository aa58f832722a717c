"""Random access: the activations of given tokens, by document and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from components.activations.dataset.manifest import Manifest, Shard
from components.activations.dataset.shuffle import bucket_of
from components.activations.dataset.values import Values
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
        if column not in self.manifest.layout.column_bytes:
            self.manifest.column(column)  # says which there are
        places = []
        for document, position, place in zip(documents, positions, self.locate(documents, positions), strict=True):
            if place is None:
                raise UserError(f"document {document}, position {position}: this token is not in {self.values.url}")
            places.append(place)
        return self.manifest.layout.tensor(column, self.values.read_rows(places, column))

    def locate(self, documents: Sequence[int], positions: Sequence[int]) -> list[tuple[Shard, int] | None]:
        """(shard, row in it) of each token, None where it is not in the dataset."""
        wanted = np.array(documents, dtype=np.int64), np.array(positions, dtype=np.int32)
        buckets, keys = bucket_of(*wanted, len(self.manifest.shards), self.manifest.seed), _key(*wanted)
        places: list[tuple[Shard, int] | None] = [None] * len(buckets)
        for bucket in np.unique(buckets).tolist():
            stored, rows = _sorted_keys(self.values, bucket)
            for number in np.flatnonzero(buckets == bucket).tolist():
                place = int(np.searchsorted(stored, keys[number]))
                if place < len(stored) and stored[place] == keys[number]:
                    places[number] = (self.manifest.shards[bucket], int(rows[place]))
        return places


def _key(documents: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return documents.astype(np.int64) << 32 | positions.astype(np.int64)


@lru_cache(maxsize=_SHARDS_KEPT)
def _sorted_keys(values: Values, bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """The keys of a shard's tokens, sorted, and the row of each."""
    keys = _key(*values.tokens(values.manifest.shards[bucket]))
    rows = np.argsort(keys)
    return keys[rows], rows
