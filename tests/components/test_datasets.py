"""A finished dataset: tokens are found in it, damage is named, a cache is bounded, and what is listed is what is there."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from components import steps, storage
from components.activations.dataset import check
from components.activations.dataset import inventory as catalog
from components.activations.dataset.lookup import ActivationLookup
from components.activations.dataset.manifest import Manifest, RowGroup, Shard, checksum, read_manifest
from components.activations.dataset.reader import ActivationReader
from components.activations.dataset.schema import Layout
from components.activations.dataset.values import DamagedDatasetError, Values
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError, digest
from components.storage.cache import DiskCache


@pytest.fixture
def tree(tiny_tree: dict) -> dict:
    tiny_tree["activations"]["hook_points"] = ["resid_post.1", "mlp_out.0"]
    return tiny_tree


@pytest.fixture
def dataset(tree: dict) -> tuple[str, Manifest]:
    plan = resolve(parse_config(tree))
    return plan.dataset_url, steps.extract(plan)


def plain(url: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """All rows by plain pandas."""
    import pandas as pd

    frame = pd.concat([pd.read_parquet(f"{url}/{shard.name}") for shard in manifest.shards], ignore_index=True)
    columns = {name: frame[name].to_numpy() for name in ("document", "position", "token")}
    return columns | {
        name: np.stack([np.frombuffer(row, dtype=np.float16) for row in frame[name]]) for name in ("resid_post.1", "mlp_out.0")
    }


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_reader_gives_what_pyarrow_reads_in_every_format(tree: dict, compression: str, dtype: str):
    tree["activations"] |= {"compression": compression, "dtype": dtype}
    plan = resolve(parse_config(tree))
    manifest = steps.extract(plan)
    names = ("document", "position", "token", "resid_post.1", "mlp_out.0")
    reader = ActivationReader(url=plan.dataset_url, manifest=manifest, columns=names, batch_size=500, seed=3)
    with closing(reader.batches()) as batches:
        read = [{name: values.clone() for name, values in next(batches).items()} for _ in range(12)]
    got = {name: torch.cat([batch[name] for batch in read]) for name in names}
    expected = {}
    for shard in manifest.shards:
        metadata = pq.read_metadata(f"{plan.dataset_url}/{shard.name}")
        wanted = {"none": "UNCOMPRESSED", "lz4": "LZ4", "zstd": "ZSTD"}[compression]
        assert metadata.row_group(0).column(3).compression == wanted
        for row in pq.read_table(f"{plan.dataset_url}/{shard.name}").to_pylist():
            expected[row["document"], row["position"]] = row
    assert len(expected) == manifest.tokens == 6_000
    assert got["resid_post.1"].dtype == getattr(torch, dtype)
    for index in range(6_000):
        row = expected.pop((int(got["document"][index]), int(got["position"][index])))
        assert row["token"] == got["token"][index]
        for name in ("resid_post.1", "mlp_out.0"):
            assert row[name] == got[name][index].view(torch.uint8).numpy().tobytes()
    assert not expected


def test_a_batch_stays_as_it_is_while_somebody_holds_it(dataset: tuple[str, Manifest]):
    url, manifest = dataset
    reader = ActivationReader(url=url, manifest=manifest, columns=("resid_post.1",), batch_size=64, seed=0, window_groups=1)
    with closing(reader.batches()) as batches:
        held = [(batch := next(batches)["resid_post.1"], batch.clone()) for _ in range(200)]
    assert all(torch.equal(batch, copy) for batch, copy in held)


def test_memory_is_used_again_when_nobody_holds_it(dataset: tuple[str, Manifest]):
    url, manifest = dataset
    reader = ActivationReader(url=url, manifest=manifest, columns=("resid_post.1",), batch_size=64, seed=0, window_groups=1)
    with closing(reader.batches()) as batches:
        places = {next(batches)["resid_post.1"].untyped_storage().data_ptr() for _ in range(1_000)}
    assert len(places) < 20  # a handful of windows, and the batches that span two of them


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_token_is_found_by_document_and_position(tree: dict, compression: str):
    tree["activations"]["compression"] = compression
    plan = resolve(parse_config(tree))
    manifest = steps.extract(plan)
    rows = plain(plan.dataset_url, manifest)
    lookup = ActivationLookup(Values(plan.dataset_url, manifest))
    picks = np.random.default_rng(0).permutation(manifest.tokens)[:200]
    documents, positions = rows["document"][picks].tolist(), rows["position"][picks].tolist()
    assert lookup(documents, positions, "token").tolist() == rows["token"][picks].tolist()
    assert (lookup(documents, positions, "mlp_out.0").numpy() == rows["mlp_out.0"][picks]).all()
    with pytest.raises(UserError, match="document 3, position 100000: this token is not in"):
        lookup([documents[0], 3], [positions[0], 100_000], "token")
    with pytest.raises(UserError, match=r"resid_post\.7.*has resid_post\.1, mlp_out\.0"):
        lookup(documents, positions, "resid_post.7")


def read_all(url: str, manifest: Manifest, columns: tuple[str, ...] = ("resid_post.1",)) -> None:
    reader = ActivationReader(url=url, manifest=manifest, columns=columns, batch_size=100, seed=0)
    with closing(reader.batches()) as batches:
        for _ in range(manifest.tokens // 100):
            next(batches)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_kind_of_damage_is_named_by_check_and_met_by_the_reader(dataset: tuple[str, Manifest]):
    url, manifest = dataset
    assert list(check.problems(url, manifest)) == []
    shard = Path(url) / "shard-00001.parquet"
    whole = shard.read_bytes()
    group = manifest.shards[1].groups["resid_post.1"][2]

    flip(shard, group.offset + group.bytes - 1)
    (problem, *_) = check.problems(url, manifest)
    assert "shard-00001.parquet is damaged: row group 2 of resid_post.1" in problem
    with pytest.raises(DamagedDatasetError, match=r"shard-00001\.parquet is damaged: row group 2 of resid_post\.1"):
        read_all(url, manifest)
    read_all(url, manifest, ("mlp_out.0",))  # which is whole

    shard.write_bytes(whole)
    flip(shard, len(whole) - 20)  # in the footer
    assert "shard-00001.parquet is damaged outside of its values" in next(check.problems(url, manifest))

    shard.write_bytes(whole[:-1000])
    assert f"has {len(whole) - 1000} bytes and not {len(whole)}" in next(check.problems(url, manifest))
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedDatasetError, match=r"shard-00001\.parquet is cut short"):
        read_all(url, manifest)

    shard.unlink()
    assert "shard-00001.parquet is missing" in next(check.problems(url, manifest))
    with pytest.raises(DamagedDatasetError, match=r"shard-00001\.parquet is missing"):
        read_all(url, manifest)

    shard.write_bytes((Path(url) / "shard-00000.parquet").read_bytes())
    assert "shard-00001.parquet" in next(check.problems(url, manifest))
    shard.write_bytes(whole)
    assert list(check.problems(url, manifest)) == []
    (Path(url) / "notes.txt").write_text("mine")
    assert catalog.strangers(url, manifest) == [f"{url}/notes.txt"]


def test_a_token_stored_twice_is_noticed(dataset: tuple[str, Manifest]):
    """A shard written again by hand, with a row of its own twice and matching checksums."""
    from components.activations.dataset.shard import write_shard_file

    url, manifest = dataset
    shard = manifest.shards[0]
    values = Values(url, manifest)
    parts = [[values.read(shard, group, name) for name in manifest.layout.column_bytes] for group in range(4)]
    records = np.concatenate([np.concatenate(part, axis=1) for part in parts])[: shard.rows]
    records[1] = records[0]
    written = write_shard_file(
        records, manifest.layout, seed=0, rows_per_group=512, compression="none", path=Path(url) / shard.name, name=shard.name
    )
    changed = manifest.model_copy(update={"shards": (written.shard, *manifest.shards[1:])})
    assert any("holds a token twice" in problem for problem in check.problems(url, changed))


def edits(value: Any, place: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every place in a JSON tree that holds a plain value, with what may come to stand there instead."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from edits(inner, (*place, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from edits(inner, (*place, number))
    else:
        new: list[Any] = [None, "", [], {}]
        if isinstance(value, int | float) and not isinstance(value, bool):
            new += [-value - 1, value + 1, value * 2 + 1, 1e300, 0.5]
        elif isinstance(value, str):
            new += [value + "0", value[1:], value.swapcase() + "x", f"../{value}", 7]
        yield from ((place, other) for other in new if other != value or type(other) is not type(value))


def edited(tree: Any, place: tuple, value: Any) -> dict:
    tree = json.loads(json.dumps(tree))
    *path, last = place
    inner = tree
    for step in path:
        inner = inner[step]
    inner[last] = value
    return tree


def test_no_edit_of_a_manifest_is_believed(dataset: tuple[str, Manifest]):
    """Each single value; then again by someone who renews the checksum: the model or the check find all that can be known."""
    url, _ = dataset
    path = Path(url) / "manifest.json"
    tree = json.loads(path.read_bytes())
    draw = random.Random(0)
    campaign = list(edits(tree))
    assert len(campaign) > 2_000
    for place, value in draw.sample(campaign, 400):
        path.write_text(json.dumps(edited(tree, place, value)))
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest(url)
    told = ("configuration", "versions", "checksum")  # what the files say nothing about
    believed, parsed = [], 0
    for place, value in draw.sample([edit for edit in campaign if edit[0][0] not in told], 300):
        forged = edited(tree, place, value)
        path.write_text(json.dumps(forged | {"checksum": checksum(forged)}))
        try:
            manifest = read_manifest(url)
        except UserError:
            continue
        parsed += 1
        if not list(check.problems(url, manifest)):
            believed.append((place, value))
    assert not believed, believed
    assert parsed > 20


def test_swapped_hook_points_and_another_mean_are_found_by_the_check(dataset: tuple[str, Manifest]):
    url, manifest = dataset
    tree = manifest.model_dump(mode="json")
    names = [column["hook_point"] for column in tree["columns"]]
    swapped = json.loads(json.dumps(tree))
    for column, name in zip(swapped["columns"], reversed(names), strict=True):
        column["hook_point"] = name
    swapped["arrow_schema"] = [*tree["arrow_schema"][:3], *reversed(tree["arrow_schema"][3:])]
    for shard in swapped["shards"]:
        shard["groups"] = {name: shard["groups"][name] for name in ("document", "position", "token", *reversed(names))}
    swapped["identity"].pop("hook_points", None)
    swapped["digest"] = digest(swapped["identity"])
    forged = Manifest.model_validate(swapped | {"checksum": checksum(swapped)})
    assert any(
        "is not a shard with the columns" in problem or "other columns" in problem for problem in check.problems(url, forged)
    )
    column = manifest.columns[0]
    for change in (
        {"mean": (column.mean[0] * 1.001, *column.mean[1:])},
        {"mean_squared_norm": column.mean_squared_norm * 1.001},
    ):
        forged = manifest.model_copy(update={"columns": (column.model_copy(update=change), *manifest.columns[1:])})
        [problem] = check.problems(url, forged)
        assert f"manifest.json: {next(iter(change))} of resid_post.1 is not that of the stored values" in problem


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"7", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b"{}", b'{"schema_version": NaN}']
)
def test_what_is_not_a_manifest_is_one_sentence_that_names_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json") as raised:
        read_manifest(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_manifest_cut_anywhere_is_damaged(dataset: tuple[str, Manifest]):
    url, _ = dataset
    path = Path(url) / "manifest.json"
    whole = path.read_bytes()
    for length in range(1, len(whole) - 1, len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedDatasetError, match="is damaged"):
            read_manifest(url)


def test_a_manifest_of_100_million_tokens_is_parsed_once(
    tmp_path: Path, dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch
):
    _, small = dataset
    rows, size, column = 131_072, 8_192, small.columns[0].model_copy(update={"d_in": 768, "mean": (0.25,) * 768})
    layout = Layout({"resid_post.1": 768}, "float16")
    groups = {
        name: tuple(
            RowGroup(offset=4 + number * size * width, bytes=size * width, xxh3="0" * 16) for number in range(rows // size)
        )
        for name, width in layout.column_bytes.items()
    }
    shards = [
        Shard(name=f"shard-{number:05d}.parquet", rows=rows, bytes=rows * layout.row_bytes, sha256="0" * 64, groups=groups)
        for number in range(-(-100_000_000 // rows))
    ]
    manifest = Manifest.sealed(
        identity={}, configuration={}, versions={}, documents=1, rows_per_group=size, compression="none", seed=0,
        shards=tuple(shards), columns=(column,),
    )  # fmt: skip
    assert manifest.tokens >= 100_000_000
    storage.put_json(manifest.model_dump(mode="json"), str(tmp_path / "manifest.json"))
    started = time.process_time()
    first = read_manifest(str(tmp_path))
    parsed = time.process_time() - started
    monkeypatch.setattr(storage, "read_bytes", lambda url: pytest.fail("read again"))
    started = time.process_time()
    again = read_manifest(str(tmp_path))
    assert time.process_time() - started < 0.2
    assert again is first
    assert first == manifest
    assert parsed < 10
    monkeypatch.undo()
    storage.put_json({"schema_version": 1}, str(tmp_path / "manifest.json"))
    with pytest.raises(UserError, match="schema version 1"):
        read_manifest(str(tmp_path))


def test_only_a_dataset_is_deleted(dataset: tuple[str, Manifest], tmp_path: Path):
    url, _ = dataset
    root, other = str(tmp_path / "root"), tmp_path / "site"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "my web site"}')
    (other / "index.html").write_text("mine")
    with pytest.raises(UserError, match=r"manifest\.json"):
        catalog.delete_dataset(str(other), root)
    assert len(list(other.iterdir())) == 2
    moved = tmp_path / "moved"
    shutil.move(url, moved)
    (moved / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not deleted: it holds '.*thesis\.txt'"):
        catalog.delete_dataset(str(moved), root)
    assert (moved / "manifest.json").exists()
    (moved / "thesis.txt").unlink()
    catalog.delete_dataset(str(moved), root)
    assert not moved.exists()


def test_mixing_is_that_of_a_random_permutation(dataset: tuple[str, Manifest]):
    url, manifest = dataset
    measured = check.mixing(url, manifest, batch_size=64)
    assert measured.share == pytest.approx(1.0, abs=0.02)
    assert abs(measured.autocorrelation) < 4 * measured.autocorrelation_noise


def test_the_ideal_of_mixing_is_what_permutations_give():
    sizes = np.array([1, 1, 5, 40, 200, 3])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    random = np.random.default_rng(0)
    drawn = [len(np.unique(random.permutation(owners)[:30])) for _ in range(4_000)]
    assert check.expected_distinct(sizes, 30) == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 4_000**0.5)
    assert check.expected_distinct(sizes, 250) == pytest.approx(6)


def test_the_cache_keeps_to_its_size_and_gives_what_was_fetched(tmp_path: Path):
    cache = DiskCache(str(tmp_path / "cache"), limit=10_000)
    fetched: list[int] = []

    def get(key: int) -> bytes:
        def fetch() -> bytes:
            fetched.append(key)
            return bytes([key]) * 1_000

        return cache.get(f"k{key}", 1_000, fetch)

    for key in [*range(8), 0, *range(8, 30), 29]:
        assert get(key) == bytes([key]) * 1_000
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 10_000
    assert fetched == list(range(30))  # 0 and 29 were asked for twice
    [newest] = [path for path in (tmp_path / "cache").iterdir() if path.read_bytes() == bytes([29]) * 1_000]
    newest.write_bytes(b"cut short")
    assert get(29) == bytes([29]) * 1_000


def test_no_key_leads_out_of_the_cache(tmp_path: Path):
    cache = DiskCache(str(tmp_path / "cache"), limit=10_000)
    for key in ("../../outside", str(tmp_path / "outside"), "x/../../outside"):
        assert cache.get(key, 2, lambda: b"ab") == b"ab"
        cache.drop(key)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_disk_that_is_too_small_is_named_before_the_language_model_runs(tree: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "free_bytes", lambda url: 100_000)
    plan = resolve(parse_config(tree))
    with pytest.raises(UserError, match=r"storage\.root: extraction needs 0\.0 GB more .* has 0\.0 GB left"):
        steps.extract(plan)
    assert not list(Path(plan.dataset_url).glob("scatter/*/*"))


def test_a_disk_that_fills_up_is_one_sentence_and_the_next_run_continues(tree: dict, monkeypatch: pytest.MonkeyPatch):
    """The error is the system's own, raised where a write reaches the disk: no test may fill the disk it runs on."""
    import errno
    import os

    plan = resolve(parse_config(tree))
    steps.prepare_tokens(plan)
    synchronise, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"storage\.root: the disk of '.*scatter/32' is full and '.*chunk-.*' could not"):
        steps.extract(plan)
    manifest = steps.extract(plan)
    assert list(check.problems(plan.dataset_url, manifest)) == []
    assert not list(Path(plan.dataset_url).glob("**/.staged-*"))


def test_datasets_are_listed_and_found_by_name_or_digest(dataset: tuple[str, Manifest], tmp_path: Path):
    url, manifest = dataset
    root = str(tmp_path / "root")
    assert catalog.find_dataset(root, "tiny") == url
    half = Path(root) / "activations" / "tiny-0123456789abcdef" / "scatter"
    half.mkdir(parents=True)
    old = Path(root) / "activations" / "tiny-fedcba9876543210"
    old.mkdir()
    storage.put_json({"schema_version": 1}, f"{old}/manifest.json")
    states = {entry.name: entry.state for entry in catalog.list_datasets(root)}
    assert states == {
        url.rsplit("/", 1)[-1]: "finished",
        half.parent.name: "unfinished",
        old.name: "another schema version",
    }
    for reference in (url, url.rsplit("/", 1)[-1], manifest.digest, manifest.digest[:5]):
        assert catalog.find_dataset(root, reference) == url
    with pytest.raises(UserError, match=r"'tiny' stands for tiny-.*write more of the digest"):
        catalog.find_dataset(root, "tiny")
    with pytest.raises(UserError, match=r"'nothing'.*tiny-"):
        catalog.find_dataset(root, "nothing")
    catalog.delete_dataset(url, root)
    assert not Path(url).exists()
    assert read_manifest(url) is None


def test_the_sample_shows_tokens_with_their_neighbours(dataset: tuple[str, Manifest]):
    url, manifest = dataset
    rows = plain(url, manifest)
    token_of = dict(
        zip(zip(rows["document"].tolist(), rows["position"].tolist(), strict=True), rows["token"].tolist(), strict=True)
    )
    sample = catalog.sample_tokens(url, manifest, lambda tokens: " ".join(map(str, tokens)), 10)
    assert len(sample) == 10
    for token in sample:
        around = range(token.position - 6, token.position + 7)
        wanted = [str(token_of[token.document, p]) for p in around if (token.document, p) in token_of]
        assert " ".join([token.before, token.text, token.after]).split() == wanted
        row = np.flatnonzero((rows["document"] == token.document) & (rows["position"] == token.position))
        assert token.norm == pytest.approx(np.linalg.norm(rows["resid_post.1"][row].astype(np.float64)), rel=1e-5)


def test_a_moved_dataset_is_read_where_it_is(dataset: tuple[str, Manifest], tmp_path: Path):
    url, _ = dataset
    shutil.move(url, tmp_path / "elsewhere")
    read_all(str(tmp_path / "elsewhere"), read_manifest(str(tmp_path / "elsewhere")))
