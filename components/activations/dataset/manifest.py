"""The manifest: a dataset is what its manifest says, and its presence is the commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from components import storage
from components.activations.dataset.schema import Layout
from components.activations.exclusion import NOTHING, Exclusion
from components.records import first_problem
from components.settings import Settings, UserError, digest

SCHEMA_VERSION = 3
_KEPT = 8
_ANEW = "delete the dataset (`sae data delete`) to make it anew"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Rows = Annotated[int, Field(ge=0, lt=1 << 50)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 60)]
Norm = Annotated[float, Field(ge=0)]


class DamagedDatasetError(UserError):
    """A dataset whose files are not what its manifest says, or a manifest that is not what was written."""


class Column(Settings):
    hook_point: str = Field(min_length=1)
    d_in: int = Field(ge=1, lt=1 << 31)
    dtype: Literal["float16", "bfloat16", "float32"]
    mean: tuple[float, ...]
    """Mean activation `[d_in]` over all stored tokens."""
    mean_squared_norm: Norm
    """Mean of `||x||^2` over all stored tokens."""
    median_norm: Norm
    """Median of `||x||` over the first shard, which is a random sample of the tokens."""

    @property
    def scale(self) -> float:
        """The scalar that makes the mean of `||x||^2` equal to `d_in` (Templeton et al. 2024, "Methods")."""
        return (self.d_in / self.mean_squared_norm) ** 0.5


class RowGroup(Settings):
    """One column of one row group: where its values are in the shard, and what they are."""

    offset: Bytes
    """First byte of the values: the column chunk without the header of its one page."""
    bytes: Bytes
    """Bytes on disk; without compression, rows times the width of a value."""
    xxh3: str = Field(pattern="^[0-9a-f]{16}$")
    """XXH3 (64 bits) of the values, uncompressed."""


class Shard(Settings):
    name: str = Field(pattern=r"^shard-[0-9]{5,}\.parquet$")
    rows: Rows
    bytes: Bytes
    sha256: Sha256
    groups: dict[str, tuple[RowGroup, ...]]
    """The row groups of each column; all but the last one of a shard hold `rows_per_group` rows."""


class Manifest(Settings):
    schema_version: Literal[3]
    checksum: Sha256
    """Of everything else in the manifest: its JSON without spaces, keys sorted."""
    digest: str
    identity: dict[str, Any]
    """Everything that decides the bytes; `digest` is its digest."""
    configuration: dict[str, Any]
    """The configuration that it was made from: name, seed, corpus, language model, activations."""
    versions: dict[str, str]
    """Libraries that wrote it."""
    arrow_schema: tuple[str, ...] = Field(min_length=1)
    """One line per column: name and type."""
    tokens: int = Field(ge=1, lt=1 << 50)
    """Rows in all shards."""
    documents: int = Field(ge=1, lt=1 << 50)
    rows_per_group: int = Field(ge=1, le=1 << 20)
    compression: Literal["none", "lz4", "zstd"]
    exclusion: Exclusion = NOTHING
    """Tokens that were left out, in numbers."""
    seed: int
    """Of the shuffle: which shard a token is in is a hash of it, the document and the position."""
    shards: tuple[Shard, ...] = Field(min_length=1)
    columns: tuple[Column, ...] = Field(min_length=1)

    @classmethod
    def sealed(cls, **fields: Any) -> Manifest:
        """A manifest with what follows from the other fields: version, digest, Arrow schema, row count, checksum."""
        layout = Layout({column.hook_point: column.d_in for column in fields["columns"]}, fields["columns"][0].dtype)
        fields |= {"schema_version": SCHEMA_VERSION, "digest": digest(fields["identity"]), "arrow_schema": arrow_lines(layout)}
        fields["tokens"] = sum(shard.rows for shard in fields["shards"])
        tree = cls.model_construct(checksum="", **fields).model_dump(mode="json")
        return cls.model_validate(tree | {"checksum": checksum(tree)})

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for problem in self._contradictions():
            raise ValueError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        """What in a manifest cannot be, whatever the files hold."""
        for column in self.columns:
            if len(column.mean) != column.d_in or column.dtype != self.columns[0].dtype:
                yield f"{column.hook_point}: mean, d_in and dtype do not agree"
            if column.mean_squared_norm == 0:
                yield f"{column.hook_point}: every activation is zero"
        if len(self.layout.widths) != len(self.columns):
            yield "a hook point is there twice"
        if self.arrow_schema != arrow_lines(self.layout):
            yield "arrow_schema is not that of the columns"
        if self.digest != digest(self.identity):
            yield "digest is not that of identity"
        said: dict[str, Any] = {"seed": self.seed, "compression": self.compression, "rows_per_group": self.rows_per_group}
        said |= {"dtype": self.columns[0].dtype, "hook_points": [column.hook_point for column in self.columns]}
        identity = {**self.identity, **self.identity.get("settings", {})}
        for name, value in said.items():
            if identity.get(name, value) != value:
                yield f"{name} is not that of identity"
        if self.tokens != sum(shard.rows for shard in self.shards) or self.documents > self.tokens:
            yield "tokens, documents and the rows of the shards do not agree"
        for number, shard in enumerate(self.shards):
            rows = self.group_rows(shard)
            if shard.name != f"shard-{number:05d}.parquet" or set(shard.groups) != set(self.layout.column_bytes):
                yield f"shard {number} has another name or other columns"
            for name, groups in shard.groups.items():
                width = self.layout.column_bytes.get(name, 0)
                if len(groups) != len(rows) or any(group.offset + group.bytes > shard.bytes for group in groups):
                    yield f"{shard.name}: the row groups of {name} are not those of {shard.rows} rows in {shard.bytes} bytes"
                elif self.compression == "none" and any(g.bytes != n * width for g, n in zip(groups, rows, strict=True)):
                    yield f"{shard.name}: the row groups of {name} have another size than their rows"

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


def arrow_lines(layout: Layout) -> tuple[str, ...]:
    return tuple(f"{field.name}: {field.type}" for field in layout.arrow)


def checksum(tree: dict[str, Any]) -> str:
    """Of a manifest as plain JSON values."""
    content = {name: value for name, value in tree.items() if name != "checksum"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(canonical.encode("utf-8")).hexdigest()


_parsed: dict[str, tuple[str, Manifest]] = {}  # by address, with what the file was then


def read_manifest(dataset: str) -> Manifest | None:
    """The manifest of a finished dataset, None where there is none; parsed once for as long as the file is the same.

    Raises a UserError for another version's, and a DamagedDatasetError for what is not a manifest as it was written.
    """
    return read_manifest_file(manifest_url(dataset))


def read_manifest_file(url: str) -> Manifest | None:
    """`read_manifest` of a manifest's own address."""
    try:
        found = storage.fingerprint(url)
        known = _parsed.get(url)
        if known is not None and known[0] == found:
            return known[1]
        manifest = _manifest(storage.read_bytes(url), url)
    except FileNotFoundError:
        return None
    while len(_parsed) >= _KEPT:
        _parsed.pop(next(iter(_parsed)), None)
    _parsed[url] = found, manifest
    return manifest


def _manifest(content: bytes, url: str) -> Manifest:
    try:
        tree = json.loads(content)
        if not isinstance(tree, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise DamagedDatasetError(f"{url} is damaged: {error}; {_ANEW}") from error
    version = tree.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{url}: schema version {version} is not {SCHEMA_VERSION}, which this version reads; {_ANEW}")
    try:
        if tree.get("checksum") != checksum(tree):
            raise ValueError("its checksum is not that of what it says")
        return Manifest.model_validate(tree)
    except ValueError as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise DamagedDatasetError(f"{url} is damaged: {reason}; {_ANEW}") from error


def require_manifest(dataset: str) -> Manifest:
    """The manifest of a finished dataset; a UserError where there is none."""
    manifest = read_manifest(dataset)
    if manifest is None:
        raise UserError(f"{manifest_url(dataset)} is not there: the dataset is not finished; run `sae extract` to finish it")
    return manifest
