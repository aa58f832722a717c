"""The manifest: a dataset is what its manifest says, and its presence is the commit."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pydantic import Field

from components import storage
from components.activations.dataset.schema import Layout
from components.settings import Settings, UserError

SCHEMA_VERSION = 2


class Column(Settings):
    hook_point: str
    d_in: int
    dtype: str
    mean: tuple[float, ...]
    """Mean activation `[d_in]` over all stored tokens."""
    mean_squared_norm: float
    """Mean of `||x||^2` over all stored tokens."""
    median_norm: float
    """Median of `||x||` over the first shard, which is a random sample of the tokens."""

    @property
    def scale(self) -> float:
        """The scalar that makes the mean of `||x||^2` equal to `d_in` (Templeton et al. 2024, "Methods")."""
        return (self.d_in / self.mean_squared_norm) ** 0.5


class RowGroup(Settings):
    """One column of one row group: where its values are in the shard, and what they are."""

    offset: int
    """First byte of the values: the column chunk without the header of its one page."""
    bytes: int
    """Bytes on disk; without compression, rows times the width of a value."""
    xxh3: str
    """XXH3 (64 bits) of the values, uncompressed."""


class Shard(Settings):
    name: str
    rows: int
    bytes: int
    sha256: str
    groups: dict[str, tuple[RowGroup, ...]]
    """The row groups of each column; all but the last one of a shard hold `rows_per_group` rows."""


class Manifest(Settings):
    schema_version: int
    digest: str
    identity: dict[str, Any]
    """Everything that decides the bytes; `digest` is its digest."""
    configuration: dict[str, Any]
    """The configuration that it was made from: name, seed, corpus, language model, activations."""
    versions: dict[str, str]
    """Libraries that wrote it."""
    arrow_schema: tuple[str, ...] = Field(min_length=1)
    """One line per column: name and type."""
    tokens: int
    """Rows in all shards."""
    documents: int
    rows_per_group: int
    compression: str
    seed: int
    """Of the shuffle: which shard a token is in is a hash of it, the document and the position."""
    shards: tuple[Shard, ...]
    columns: tuple[Column, ...]

    @cached_property
    def layout(self) -> Layout:
        return Layout({column.hook_point: column.d_in for column in self.columns}, self.columns[0].dtype)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def group_rows(self, shard: Shard) -> list[int]:
        """Rows in each of a shard's row groups."""
        full, rest = divmod(shard.rows, self.rows_per_group)
        return [self.rows_per_group] * full + ([rest] if rest else [])

    def column(self, hook_point: str) -> Column:
        for column in self.columns:
            if column.hook_point == hook_point:
                return column
        stored = ", ".join(column.hook_point for column in self.columns)
        raise UserError(f"training.hook_point: '{hook_point}' is not stored in the dataset, which has {stored}")


def manifest_url(dataset: str) -> str:
    return storage.join(dataset, "manifest.json")


def read_manifest(dataset: str) -> Manifest | None:
    """The manifest of a finished dataset, None where there is none; a UserError for another version's."""
    content = storage.read_json_if_present(manifest_url(dataset))
    if content is None:
        return None
    if content.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{manifest_url(dataset)}: schema version {content.get('schema_version')} is not {SCHEMA_VERSION}, "
            "which this version reads; delete the dataset (`sae data delete`) to make it anew"
        )
    return Manifest.model_validate(content)


def require_manifest(dataset: str) -> Manifest:
    """The manifest of a finished dataset; a UserError where there is none."""
    manifest = read_manifest(dataset)
    if manifest is None:
        raise UserError(f"{manifest_url(dataset)} is not there: the dataset is not finished; run `sae extract` to finish it")
    return manifest
