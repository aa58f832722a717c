"""The manifest of a token dataset: what its files hold, and where it came from. Its presence is the commit."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from components import storage
from components.records import read_record
from components.settings import Record

SCHEMA_VERSION: Literal[2] = 2
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
REMEDY = "delete the folder of the token dataset to make it anew"


class TokenShard(Record):
    name: str = Field(pattern=r"^(train|held_out)-[0-9]{5,}\.parquet$")
    sequences: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TokenSplit(Record):
    tokens: int = Field(ge=0)
    """That count: neither padding nor what the tokenizer adds."""
    sequences: int = Field(ge=0)
    documents: int = Field(ge=0)
    shards: tuple[TokenShard, ...]


class SourceSplit(Record):
    tokens: int
    documents: int


class SourceEntry(Record):
    """What one source of a mixture gave."""

    name: str
    share: float
    read_from: tuple[str, ...]
    ended: bool
    """It had no more documents before its share was reached."""
    duplicates_dropped: dict[str, int]
    splits: dict[str, SourceSplit]


class TokenManifest(Record):
    schema_version: Literal[2]
    digest: str
    identity: dict[str, Any]
    context_length: int = Field(ge=1)
    documents: int = Field(ge=1)
    unreadable: int = 0
    """Of an image corpus, files that are no image."""
    splits: dict[Split, TokenSplit] = Field(min_length=2)
    sources: tuple[SourceEntry, ...] = ()
    """None of an image corpus."""
    checksum: str = ""
    """Of everything else in the manifest: its JSON without spaces, keys sorted; none of earlier ones."""

    def sealed(self) -> TokenManifest:
        return self.model_copy(update={"checksum": self._checksum()})

    def _checksum(self) -> str:
        tree = self.model_dump(mode="json", exclude={"checksum"})
        return sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @model_validator(mode="after")
    def _is_what_was_written(self) -> Self:
        if self.checksum and self.checksum != self._checksum():
            raise ValueError("its checksum is not that of what it says")
        return self


def manifest_url(url: str) -> str:
    return storage.join(url, "manifest.json")


def read_token_manifest(url: str) -> TokenManifest | None:
    """The manifest of the token dataset at `url`, None where it is not finished."""
    return read_record(TokenManifest, manifest_url(url), REMEDY)


def commit(url: str, manifest: TokenManifest) -> TokenManifest:
    """Put the manifest, unless another process was first; either way, return the one that is there."""
    storage.put_json_once(manifest.sealed().model_dump(mode="json"), manifest_url(url))
    stored = read_token_manifest(url)
    assert stored is not None
    return stored
