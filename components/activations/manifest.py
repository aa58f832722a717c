"""The manifest: a dataset is what its manifest says, and its presence is the commit."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from components import storage
from components.settings import Settings, UserError

SCHEMA_VERSION = 1


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


class Shard(Settings):
    name: str
    rows: int
    bytes: int
    sha256: str


class Manifest(Settings):
    schema_version: int
    digest: str
    identity: dict[str, Any]
    """Everything that decides the bytes; `digest` is its digest."""
    versions: dict[str, str]
    """Libraries that wrote it."""
    arrow_schema: tuple[str, ...] = Field(min_length=1)
    """One line per column: name and type."""
    tokens: int
    """Rows in all shards."""
    documents: int
    shards: tuple[Shard, ...]
    columns: tuple[Column, ...]

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
            "which this version reads; delete the dataset to make it anew"
        )
    return Manifest.model_validate(content)
