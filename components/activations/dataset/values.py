"""The values of a dataset's columns, row group by row group: one ranged read each, checked against the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import xxhash

from components import storage
from components.activations.dataset.manifest import DamagedDatasetError, Manifest, RowGroup, Shard
from components.activations.dataset.schema import memory
from components.activations.dataset.shard import decoded
from components.storage.cache import DiskCache

__all__ = ["DamagedDatasetError", "Values"]


@dataclass(frozen=True, eq=False)
class Values:
    """Access to the values of one dataset. Memory: what it hands out."""

    url: str
    manifest: Manifest
    cache: DiskCache | None = None

    @cached_property
    def _folder(self) -> str | None:
        """The dataset's folder on this machine, None where it is elsewhere. (To ask for each read took longer than reading.)"""
        return str(storage.local_path(self.url)) if storage.is_local(self.url) else None

    def read(self, shard: Shard, group: int, column: str) -> np.ndarray:
        """A row group's values, uint8 `[rows, column_bytes]`."""
        values = np.empty((self.manifest.group_rows(shard)[group], self.manifest.layout.column_bytes[column]), dtype=np.uint8)
        self.read_into(shard, group, column, [memory(values)])
        return values

    def read_into(self, shard: Shard, group: int, column: str, targets: Sequence[memoryview]) -> None:
        """Fill the targets, one after the other, with a row group's values.

        Raises a DamagedDatasetError that names the shard where it is missing, cut short, or holds anything else.
        """
        place = shard.groups[column][group]
        url = storage.join(self.url, shard.name)
        try:
            checksum = self._fill(url, place, targets)
            if checksum != place.xxh3 and self.cache is not None:
                self.cache.drop(self._key(url, place))
                checksum = self._fill(url, place, targets)
        except FileNotFoundError as error:
            raise DamagedDatasetError(f"{url} is missing; `sae data check` says what else is") from error
        except EOFError as error:
            raise DamagedDatasetError(f"{url} is cut short: it ends within row group {group} of {column}") from error
        if checksum != place.xxh3:
            raise DamagedDatasetError(
                f"{url} is damaged: row group {group} of {column} (bytes {place.offset} to {place.offset + place.bytes}) is "
                "not what was written; `sae data check` looks at the rest"
            )

    def tokens(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        """Documents and positions of a shard's rows, int64 `[rows]` each."""

        def column(name: str, kind: type) -> np.ndarray:
            parts = [self.read(shard, group, name).reshape(-1) for group in range(len(shard.groups[name]))]
            return np.concatenate([np.empty(0, dtype=np.uint8), *parts]).view(kind).astype(np.int64)

        return column("document", np.int64), column("position", np.int32)

    def read_rows(self, places: Sequence[tuple[Shard, int]], column: str) -> np.ndarray:
        """Single rows given as (shard, row in it), uint8 `[n, column_bytes]`.

        Without compression just these bytes are read, and so they cannot be checked.
        """
        width = self.manifest.layout.column_bytes[column]
        rows = np.empty((len(places), width), dtype=np.uint8)
        if self.manifest.compression == "none":
            raw = memory(rows)
            ranges = []
            for number, (shard, row) in enumerate(places):
                group, index = divmod(row, self.manifest.rows_per_group)
                start = shard.groups[column][group].offset + index * width
                ranges.append((storage.join(self.url, shard.name), start, raw[number * width : (number + 1) * width]))
            storage.read_ranges(ranges)
            return rows
        groups: dict[tuple[str, int], np.ndarray] = {}
        for number, (shard, row) in enumerate(places):
            group, index = divmod(row, self.manifest.rows_per_group)
            if (shard.name, group) not in groups:
                groups = {(shard.name, group): self.read(shard, group, column)}  # one at a time
            rows[number] = groups[shard.name, group][index]
        return rows

    def _fill(self, url: str, place: RowGroup, targets: Sequence[memoryview]) -> str:
        """Fill the targets and return the checksum of what came."""
        size = sum(map(len, targets))
        state = xxhash.xxh3_64()
        if self.manifest.compression == "none" and self._folder is not None:
            storage.fill(f"{self._folder}/{url.rsplit('/', 1)[-1]}", targets, place.offset)
            for target in targets:
                state.update(target)
            return state.hexdigest()
        raw = self._fetch(url, place)
        try:
            values = decoded(raw, size, self.manifest.compression)
        except OSError:  # not what the codec has written
            return "undecodable"
        state.update(values)
        start = 0
        for target in targets:
            target[:] = values[start : start + len(target)]
            start += len(target)
        return state.hexdigest()

    def _fetch(self, url: str, place: RowGroup) -> bytes:
        if self.cache is None or self._folder is not None:
            return storage.read_range(url, place.offset, place.bytes)
        fetch = partial(storage.read_range, url, place.offset, place.bytes)
        return self.cache.get(self._key(url, place), place.bytes, fetch)

    def _key(self, url: str, place: RowGroup) -> str:
        return f"{self.manifest.digest}-{url.rsplit('/', 1)[-1]}-{place.offset}-{place.xxh3}"
