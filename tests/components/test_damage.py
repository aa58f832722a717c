"""Files of a dataset that are not what was written: an error that names them, or the very same data, and nothing between."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components import steps
from components.activations.dataset.manifest import require_manifest
from components.activations.dataset.reader import ActivationReader
from components.corpus.tokens import _read_shard, read_sequences
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError

SMALL = {"rows_per_shard": 700, "rows_per_group": 128, "hook_points": ["resid_post.1", "mlp_out.0"]}
VALUES: list[Any] = [None, True, 0, 1, -1, 7, 10**20, 0.5, "", "x", [], {}, "0" * 64, "train-00000.parquet", "../x"]


@pytest.fixture
def written(tiny_tree: dict) -> tuple[str, str]:
    """Addresses of a small token dataset and a small activation dataset."""
    tiny_tree["corpus"] |= {"train_tokens": 2_000, "held_out_tokens": 500}
    tiny_tree["activations"] |= SMALL
    run = resolve(parse_config(tiny_tree))
    steps.extract(run)
    return run.token_url, run.dataset_url


def tokens_of(url: str) -> list[Any]:
    from components.corpus.manifest import read_token_manifest

    _read_shard.cache_clear()
    manifest = read_token_manifest(url)
    if manifest is None:
        raise UserError("it is not there")
    blocks = [read_sequences(url, manifest, split, 0, 10**6) for split in ("train", "held_out")]
    # Earlier manifests have no checksum, so that one which lost it says the same without.
    return [
        manifest.model_copy(update={"checksum": ""}),
        *(array for block in blocks for array in (block.tokens, block.documents, block.positions)),
    ]


def activations_of(url: str) -> list[Any]:
    manifest = require_manifest(url)
    columns = ("document", "position", "token", *SMALL["hook_points"])
    reader = ActivationReader(url=url, manifest=manifest, columns=columns, batch_size=500, seed=1)
    with closing(reader.batches()) as batches:
        read = [{name: values.clone() for name, values in next(batches).items()} for _ in range(4)]
    return [manifest, *(batch[name].numpy() for batch in read for name in columns)]


def same(one: list[Any], other: list[Any]) -> bool:
    return one[0] == other[0] and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one[1:], other[1:], strict=True))


def harmed(content: bytes, others: list[bytes], chance: random.Random) -> bytes | None:
    """Another content, None for a file that is gone."""
    place, size = chance.randrange(len(content)), chance.choice((1, 1, 8, 64, 1000))
    match chance.randrange(9):
        case 0 | 1:
            return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
        case 2:
            return content[:place]
        case 3:
            return content[:place] + bytes(min(size, len(content) - place)) + content[place + size :]
        case 4:
            return content[:place] + chance.randbytes(size) + content[place:]
        case 5:
            return content[:place] + content[place + size :]
        case 6:
            return content + chance.randbytes(size)
        case 7:
            return chance.choice(others)
    return chance.choice((None, b"", b"{}", b"[]", b"null", b"[" * 100_000))


def changed_json(content: bytes, chance: random.Random) -> bytes:
    """A manifest that is JSON still, with another value somewhere."""
    tree = json.loads(content)
    node, key = tree, chance.choice(sorted(tree))
    while isinstance(node[key], dict | list) and node[key] and chance.random() < 0.8:
        node = node[key]
        key = chance.choice(sorted(node)) if isinstance(node, dict) else chance.randrange(len(node))
    if chance.random() < 0.2:
        del node[key]
    elif isinstance(node[key], int | float) and chance.random() < 0.5:
        node[key] += chance.choice((-1, 1))
    else:
        node[key] = chance.choice(VALUES)
    return json.dumps(tree).encode()


def wrong(url: str, read: Callable[[str], list[Any]], seed: int, count: int) -> list[str]:
    """What was accepted though it is other data, or failed in another way than with one sentence."""
    right, found, refused = read(url), [], 0
    files = sorted(path for path in Path(url).iterdir() if path.name == "manifest.json" or "-0" in path.name)
    contents = {path: path.read_bytes() for path in files}
    for number in range(count):
        chance = random.Random(seed * 7919 + number)
        path = chance.choice([files[-1], *files]) if chance.random() < 0.5 else chance.choice(files)
        if path.name == "manifest.json" and chance.random() < 0.6:
            content = changed_json(contents[path], chance)
        else:
            content = harmed(contents[path], list(contents.values()), chance)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        try:
            if not same(read(url), right):
                found.append(f"{number}: {path.name} was accepted with other data")
        except UserError as error:
            refused += 1
            if "\n" in str(error):
                found.append(f"{number}: {path.name}: {error}")
        except Exception as error:
            found.append(f"{number}: {path.name}: {type(error).__name__}: {str(error)[:200]}")
        path.write_bytes(contents[path])
    assert same(read(url), right)
    print(f"{refused} of {count} were refused")
    assert refused > count / 2, "most harm is noticed, since most of it changes something"
    return found


@pytest.mark.parametrize("seed", [1])
def test_30_damaged_files_each_of_tokens_and_activations_give_an_error_or_the_same_data(seed: int, written: tuple[str, str]):
    assert wrong(written[0], tokens_of, seed, 30) == []
    assert wrong(written[1], activations_of, seed, 30) == []


@pytest.mark.soak
def test_500_damaged_files_each_of_tokens_and_activations_give_an_error_or_the_same_data(written: tuple[str, str]):
    assert wrong(written[0], tokens_of, 2, 500) == []
    assert wrong(written[1], activations_of, 2, 500) == []
