"""The datasets under a root: list them, find one, look into one, delete one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from components import storage
from components.activations.dataset.lookup import ActivationLookup
from components.activations.dataset.manifest import DamagedDatasetError, Manifest, manifest_url, read_manifest, require_manifest
from components.activations.dataset.schema import as_float32
from components.activations.dataset.values import Values
from components.activations.exclusion import sinks_warning
from components.settings import Settings, UserError

_CONTEXT = 6


class Entry(Settings):
    """A dataset's folder under a root."""

    name: str
    url: str
    manifest: Manifest | None
    """None where it cannot be read."""
    state: str
    """`finished`, `unfinished`, `online` where it is a folder of generations, or why it cannot be read."""
    bytes: int
    """Of what is finished; scattered chunks of an unfinished one are not counted."""


class SampledToken(Settings):
    """A stored token with its neighbours in the document, as text."""

    document: int
    position: int
    before: str
    text: str
    after: str
    norm: float
    """Of its activation at the first hook point."""


def list_datasets(root: str) -> list[Entry]:
    """Every dataset under a root, finished or not."""
    folder = storage.join(root, "activations")
    return [_entry(folder, name) for name in storage.list_folders(folder)]


def _entry(folder: str, name: str) -> Entry:
    url = storage.join(folder, name)
    try:
        manifest = read_manifest(url)
        state = "unfinished" if manifest is None else "finished"
        if manifest is None and storage.exists(storage.join(url, "ledger.json")):  # see `components.activations.online.folder`
            state = "online"
    except DamagedDatasetError:
        manifest, state = None, "damaged"
    except UserError:
        manifest, state = None, "another schema version"
    return Entry(name=name, url=url, manifest=manifest, state=state, bytes=0 if manifest is None else manifest.bytes)


def find_dataset(root: str, reference: str) -> str:
    """The URL of the dataset that a URL, a name (that of the configuration where it has one
    dataset), or the beginning of a digest stands for; a UserError otherwise."""
    if storage.exists(manifest_url(reference)):
        return reference.rstrip("/")
    folder = storage.join(root, "activations")
    names = storage.list_folders(folder)
    named = [(name, *name.rsplit("-", 1)) for name in names]
    found = [name for name, *parts in named if reference in (name, parts[0]) or parts[-1].startswith(reference)]
    if len(found) == 1:
        return storage.join(folder, found[0])
    if found:
        raise UserError(f"DATASET: '{reference}' stands for {', '.join(found)}; write more of the digest")
    raise UserError(f"DATASET: there is no '{reference}' under '{folder}', which has {', '.join(names) or 'none'}")


def delete_dataset(url: str, root: str) -> None:
    """Remove a dataset, its manifest first: whatever happens meanwhile, half of it is never taken for whole.

    Raises a UserError for a folder that may be something else: elsewhere than under the root, it must be whole and hold
    nothing but its files.
    """
    folder = storage.resolve(storage.join(root, "activations"))[1]
    if storage.resolve(url)[1].rstrip("/").rsplit("/", 1)[0] != folder.rstrip("/"):
        manifest = require_manifest(url)
        others = strangers(url, manifest) + [name for name in storage.list_folders(url) if name != "scatter"]
        if others:
            raise UserError(f"DATASET: '{url}' is not deleted: it holds '{others[0]}', which is no part of a dataset")
    storage.delete(manifest_url(url))
    storage.delete(url)
    if storage.is_local(url):
        storage.delete(f"{url.rstrip('/')}.lock")


def strangers(url: str, manifest: Manifest) -> list[str]:
    """Files in the dataset's folder that are no part of it."""
    known = {shard.name for shard in manifest.shards} | {"manifest.json"}
    return [storage.join(url, name) for name in storage.list_names(url) if name not in known]


def norms(url: str, manifest: Manifest, hook_point: str) -> np.ndarray:
    """`||x||` of the rows of the first row group, which is a random sample of all."""
    raw = Values(url, manifest).read(_first_shard(manifest), 0, hook_point)
    return np.linalg.norm(as_float32(raw, manifest.layout.dtype), axis=1)


def sinks_warnings(manifest: Manifest) -> list[str]:
    """A sentence for each hook point at which a few tokens hold most of the squared norm."""
    found = (sinks_warning(column.hook_point, column.mean_squared_norm, column.median_norm) for column in manifest.columns)
    return [warning for warning in found if warning is not None]


def sample_tokens(url: str, manifest: Manifest, decode: Callable[[list[int]], str], count: int) -> list[SampledToken]:
    """Tokens of the first row group, a random sample of all, each with its neighbours.

    decode: text of token ids.
    """
    values = Values(url, manifest)
    lookup = ActivationLookup(values)
    shard = _first_shard(manifest)
    documents, positions = values.tokens(shard)
    norm = norms(url, manifest, manifest.columns[0].hook_point)
    found = []
    for document, position, length in zip(documents[:count].tolist(), positions.tolist(), norm.tolist(), strict=False):
        around = [p for p in range(position - _CONTEXT, position + _CONTEXT + 1) if p >= 0]
        places = lookup.locate([document] * len(around), around)
        there = [(p, place) for p, place in zip(around, places, strict=True) if place is not None]
        raw = values.read_rows([place for _, place in there], "token")
        tokens = raw.view(np.int32).reshape(-1).tolist()
        here = [p for p, _ in there].index(position)
        found.append(
            SampledToken(
                document=document,
                position=position,
                before=decode(tokens[:here]),
                text=decode(tokens[here : here + 1]),
                after=decode(tokens[here + 1 :]),
                norm=length,
            )
        )
    return found


def _first_shard(manifest: Manifest) -> Any:
    return next(shard for shard in manifest.shards if shard.rows)
