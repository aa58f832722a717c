"""An activation dataset holds every token once, mixed, whoever worked on it; and is read the same from any point."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from components import steps, storage
from components.activations.dataset import extraction, shuffle
from components.activations.dataset.forward import run_chunk
from components.activations.dataset.job import Extraction, chunk_sequences
from components.activations.dataset.manifest import read_manifest
from components.activations.dataset.reader import ActivationReader, _Buffers
from components.activations.dataset.shuffle import Scattered, bucket_of, order_of, plan_shuffle
from components.corpus.manifest import TokenShard
from components.corpus.tokens import read_sequences
from components.language_model.hook_points import HookPoint, capture
from components.language_model.loading import forward_inputs, load_model
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError

CPU = torch.device("cpu")


def shards(url: str) -> pa.Table:
    manifest = read_manifest(url)
    return pa.concat_tables(pq.read_table(f"{url}/{shard.name}") for shard in manifest.shards)


def put_chunk(work: Extraction, model: torch.nn.Module, chunk: int) -> None:
    block = chunk_sequences(work, chunk)
    extraction.write_chunk(work, chunk, run_chunk(work.source, model, work.points, block, work.settings.dtype, CPU))


@pytest.fixture
def plan(tiny_tree: dict) -> Specification:
    tiny_tree["activations"]["hook_points"] = ["resid_post.1", "mlp_out.0"]
    return resolve(parse_config(tiny_tree))


def values_of(table: pa.Table, hook_point: str, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """`[n, d_in]`, by plain Arrow and torch."""
    array = table[hook_point].combine_chunks()
    return torch.frombuffer(bytearray(array.buffers()[1]), dtype=dtype).reshape(len(array), -1)


def test_every_counted_token_is_stored_once_with_the_models_activation(plan: Specification):
    manifest = steps.extract(plan)
    table = shards(plan.dataset_url)
    tokens = plan.token_manifest()
    block = read_sequences(plan.token_url, tokens, "train", 0, 10**6)
    model = load_model(plan.source, CPU)
    points = [HookPoint("resid_post", 1), HookPoint("mlp_out", 0)]
    expected = capture(model, points, forward_inputs(plan.source, block, CPU))
    counted = block.documents >= 0
    place = {key: row for row, key in enumerate(zip(block.documents[counted], block.positions[counted], strict=True))}
    rows = [place[key] for key in zip(table["document"].to_numpy(), table["position"].to_numpy(), strict=True)]
    assert sorted(rows) == list(range(manifest.tokens)) == list(range(int(counted.sum())))
    assert (table["token"].to_numpy() == block.tokens[counted][rows]).all()
    for point in points:
        stored = values_of(table, str(point)).float()
        wanted = expected[point][torch.tensor(counted)][rows]
        torch.testing.assert_close(stored, wanted, rtol=1e-3, atol=1e-4)


def test_plain_pyarrow_and_pandas_read_what_the_manifest_says(plan: Specification):
    manifest = steps.extract(plan)
    for shard in manifest.shards:
        path = Path(plan.dataset_url) / shard.name
        file = pq.ParquetFile(path)
        assert file.metadata.num_rows == shard.rows
        assert path.stat().st_size == shard.bytes
        assert storage.file_sha256(path) == shard.sha256
        assert tuple(f"{field.name}: {field.type}" for field in file.schema_arrow) == manifest.arrow_schema
        assert file.metadata.row_group(0).column(3).compression == "UNCOMPRESSED"
        frame = pd.read_parquet(path)
        assert len(frame) == shard.rows
        assert str(frame.dtypes["document"]) == "int64"
        first = np.frombuffer(frame["resid_post.1"][0], dtype=np.float16)
        assert first.shape == (32,)
    assert sum(shard.rows for shard in manifest.shards) == manifest.tokens
    assert len(manifest.shards) == 3


def test_mean_and_scale_are_those_of_the_stored_values(plan: Specification):
    manifest = steps.extract(plan)
    values = values_of(shards(plan.dataset_url), "resid_post.1").double().numpy()
    column = manifest.column("resid_post.1")
    np.testing.assert_allclose(column.mean, values.mean(axis=0), rtol=1e-9, atol=1e-12)
    assert ((values * column.scale) ** 2).sum(axis=1).mean() == pytest.approx(32, rel=1e-9)


def test_train_and_held_out_documents_are_disjoint(tiny_tree: dict):
    documents = {}
    for split in ("train", "held_out"):
        tiny_tree["activations"]["split"] = split
        plan = resolve(parse_config(tiny_tree))
        steps.extract(plan)
        documents[split] = set(shards(plan.dataset_url)["document"].to_pylist())
        assert len(documents[split]) == plan.dataset_manifest().documents
    assert documents["train"]
    assert documents["held_out"]
    assert not documents["train"] & documents["held_out"]


def test_the_bytes_do_not_depend_on_chunks_order_or_repetition(plan: Specification, tmp_path: Path):
    manifest = steps.extract(plan)
    work = plan.extraction(plan.token_manifest())
    settings = work.settings.model_copy(update={"sequences_per_chunk": 64})
    other = dataclasses.replace(work, url=str(tmp_path / "other"), settings=settings)
    model = load_model(plan.source, CPU)
    for chunk in [*reversed(range(other.chunks)), 0]:
        put_chunk(other, model, chunk)
    scattered = Scattered([other.chunk_url(chunk) for chunk in range(other.chunks)], other.buckets, other.layout)
    for bucket in [2, 0, 1, 2]:
        extraction.write_shard(other, bucket, scattered)
    assert extraction.extract(other, CPU).shards == manifest.shards


def test_a_half_done_extraction_continues_and_leaves_nothing_behind(plan: Specification, tmp_path: Path):
    manifest = steps.extract(plan)
    again = dataclasses.replace(plan.extraction(plan.token_manifest()), url=str(tmp_path / "again"))
    model = load_model(plan.source, CPU)
    for chunk in (0, 2):
        put_chunk(again, model, chunk)
    assert extraction.extract(again, CPU).shards == manifest.shards
    names = sorted(path.name for path in Path(again.url).iterdir())
    assert names == ["manifest.json", *(shard.name for shard in manifest.shards)]


def test_two_processes_that_extract_the_same_dataset_both_end_with_it(plan: Specification, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(plan.config.model_dump(mode="json")))
    command = [str(Path(sys.executable).parent / "sae"), "extract", str(config), "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert json.loads(answers[0][0]) == json.loads(answers[1][0])
    table = shards(plan.dataset_url)
    assert len(set(zip(table["document"].to_pylist(), table["position"].to_pylist(), strict=True))) == len(table) == 6_000
    assert not (Path(plan.dataset_url) / "scatter").exists()


def test_activations_that_do_not_fit_the_number_format_are_refused(tiny_tree: dict, tiny_model: str, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    large = tmp_path / "large"
    shutil.copytree(tiny_model, large)
    weights = load_file(large / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1e6
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    tiny_tree["language_model"]["name"] = str(large)
    tiny_tree["activations"]["hook_points"] = ["resid_pre.0"]
    with pytest.raises(UserError, match=r"activations\.dtype.*float16.*bfloat16"):
        steps.extract(resolve(parse_config(tiny_tree)))


def test_a_manifest_of_another_schema_version_is_refused(tmp_path: Path):
    storage.put_json({"schema_version": 99}, str(tmp_path / "manifest.json"))
    with pytest.raises(UserError, match=r"manifest\.json.*99"):
        read_manifest(str(tmp_path))


def test_the_shuffle_is_a_uniform_permutation():
    documents, positions = np.arange(200_000) // 500, np.arange(200_000) % 500
    counts = np.bincount(bucket_of(documents, positions, 16, seed=1), minlength=16)
    assert abs(counts / 200_000 * 16 - 1).max() < 0.03
    order = order_of(documents, positions, seed=1)
    assert (np.sort(order) == np.arange(200_000)).all()
    assert abs(np.corrcoef(np.arange(199_999), order[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert (order_of(documents, positions, seed=2) != order).mean() > 0.99


def test_the_order_of_the_rows_is_what_it_was_when_the_version_was_set():
    """Whoever changes it raises the version of `activations` in `components/run/identity.py`, and this digest."""
    documents, positions = np.repeat(np.arange(40), 25), np.tile(np.arange(25), 40)
    places = np.stack([bucket_of(documents, positions, 8, seed=7), order_of(documents, positions, seed=7)])
    assert sha256(places.astype("<i8").tobytes()).hexdigest()[:16] == "dccefec06d1bfd11"


def test_a_shuffle_of_a_billion_tokens_is_planned_within_a_million_reads():
    """GPT-2's width in float16: 256 sequences of 128 tokens in a chunk, 131,072 rows in a shard."""
    row = 768 * 2 + 16
    chunks, buckets = -(-(10**9) // (256 * 128)), round(10**9 / 131_072)
    assert chunks * buckets > 2.3e8
    plan = plan_shuffle(chunks, buckets, 256 * 128 * row)
    assert plan.reads <= 1_000_000
    assert plan.memory <= 1 << 30
    assert plan.levels == 2
    assert plan_shuffle(100, 100, 256 * 128 * row).levels == 0


@pytest.mark.parametrize("merge_bytes", [20_000, 1 << 29])
def test_merging_first_gives_the_same_bytes_in_as_many_reads_as_planned(
    plan: Specification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge_bytes: int
):
    manifest = steps.extract(plan)
    monkeypatch.setattr(shuffle, "MERGE_BYTES", merge_bytes)
    monkeypatch.setattr(shuffle, "MOST_READS", 20)
    monkeypatch.setattr(shuffle, "_WIDTHS", (2,))
    whole, reads = storage.read_ranges, []

    def counted(ranges: list) -> None:
        reads.extend(url for url, _, _ in ranges if "/scatter/" in url)
        whole(ranges)

    work = plan.extraction(plan.token_manifest())
    settings = work.settings.model_copy(update={"sequences_per_chunk": 16})
    other = dataclasses.replace(work, url=str(tmp_path / "other"), settings=settings)
    assert other.shuffle.levels >= 2
    extraction.scatter(other, CPU, range(other.chunks))
    monkeypatch.setattr(storage, "read_ranges", counted)
    extraction.merge(other, 1, 0)  # and killed after it
    assert "chunk-000000.bin" not in storage.list_names(other.scatter_url)
    monkeypatch.setattr(extraction, "kept_model", lambda *_: pytest.fail("the chunks are there, merged"))
    assert extraction.extract(other, CPU).shards == manifest.shards
    assert 0 < len(reads) <= other.shuffle.reads
    assert not Path(other.scatter_url).exists()


def test_a_merged_chunk_that_is_damaged_is_named(plan: Specification, tmp_path: Path):
    steps.extract(plan)
    work = dataclasses.replace(plan.extraction(plan.token_manifest()), url=str(tmp_path / "other"))
    extraction.scatter(work, CPU, range(work.chunks))
    urls = [work.chunk_url(chunk) for chunk in range(work.chunks)]
    for place, match in ((8, "its table"), (-1, "bucket 2")):
        content = bytearray(Path(urls[1]).read_bytes())
        content[place] ^= 1
        Path(urls[1]).write_bytes(content)
        with pytest.raises(UserError, match=rf"chunk-000001\.bin does not hold what was written \({match}"):
            Scattered(urls, work.buckets, work.layout).merge(tmp_path / "merged", 1 << 20)
        content[place] ^= 1
        Path(urls[1]).write_bytes(content)


def test_workers_that_share_a_dataset_read_a_shard_of_tokens_once_and_not_once_per_chunk(
    plan: Specification, monkeypatch: pytest.MonkeyPatch
):
    work = plan.extraction(steps.prepare_tokens(plan))
    names = [f"train-{number:05d}.parquet" for number in range(8)]
    shards = tuple(TokenShard.model_construct(name=name, sequences=640) for name in names)
    split = work.split.model_copy(update={"sequences": 8 * 640, "shards": shards})
    manifest = work.token_manifest.model_copy(update={"splits": {"train": split}})
    work = dataclasses.replace(work, token_manifest=manifest)
    monkeypatch.setattr(extraction, "_shared", lambda work: True)
    order = extraction._apart(work, range(work.chunks), extraction._chunks_per_token_shard(work))
    assert sorted(order) == list(range(8 * 640 // 32))
    assert order != sorted(order)
    fetched, kept = 0, []
    for chunk in order:
        shard = chunk * 32 // 640
        if shard not in kept:
            fetched, kept = fetched + 1, [*kept, shard][-2:]
    assert fetched == 8


def reader(plan: Specification, **changes) -> ActivationReader:
    manifest = plan.dataset_manifest()
    values = {"url": plan.dataset_url, "manifest": manifest, "columns": ("resid_post.1",), "batch_size": 300, "seed": 0}
    return ActivationReader(**{**values, **changes})


def take(source: ActivationReader, count: int, start: int = 0, column: str = "resid_post.1") -> list[torch.Tensor]:
    with closing(source.batches(start)) as batches:
        return [next(batches)[column].clone() for _ in range(count)]


def test_an_epoch_of_batches_holds_every_row_once_and_the_next_one_in_another_order(plan: Specification):
    steps.extract(plan)
    source = reader(plan, batch_size=100)
    assert source.tokens == 6_000
    batches = torch.cat(take(source, 120))
    stored = values_of(shards(plan.dataset_url), "resid_post.1")

    def sorted_rows(values: torch.Tensor) -> list[bytes]:
        return sorted(row.tobytes() for row in values.numpy())

    assert sorted_rows(batches[:6000]) == sorted_rows(batches[6000:]) == sorted_rows(stored)
    assert not torch.equal(batches[:6000], batches[6000:])


@pytest.mark.parametrize("batch", [0, 1, 13, 19, 20, 21, 37])
def test_reading_resumes_at_any_batch_with_any_number_of_threads(plan: Specification, batch: int):
    steps.extract(plan)
    whole = take(reader(plan, window_groups=3, threads=1), 40)
    rest = take(reader(plan, window_groups=3, threads=1 + batch % 5), 40 - batch, start=300 * batch)
    assert all(torch.equal(a, b) for a, b in zip(whole[batch:], rest, strict=True))
    assert not torch.equal(take(reader(plan, window_groups=3, seed=1), 1)[0], whole[0])


@pytest.mark.parametrize(("start", "parts"), [(0, 1), (300, 3), (4_500, 1), (5_997, 5)])
def test_the_ranks_batches_side_by_side_are_those_of_one(plan: Specification, start: int, parts: int):
    """Part by part: what several take together is what one takes, however it goes through its batch."""
    steps.extract(plan)
    source = reader(plan, columns=("document", "position", "resid_post.1"), parts=parts)
    for ranks in (1, 2, 4):
        streams = [source.batches(start, rank, ranks) for rank in range(ranks)]
        with closing(source.batches(start)) as whole:
            for _ in range(22):
                one, shares = next(whole), [next(stream) for stream in streams]
                for name in source.columns:
                    of_parts = zip(*(share[name].chunk(parts) for share in shares), strict=True)
                    assert torch.equal(one[name], torch.cat([torch.cat(part) for part in of_parts]))
                    assert len(shares[0][name]) == 300 // ranks
        for stream in streams:
            stream.close()
    for rank, ranks in ((0, 7), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no equal slice"):
            next(source.batches(0, rank, ranks))


def test_the_thread_that_takes_memory_for_a_gpu_is_on_that_gpu(plan: Specification, monkeypatch: pytest.MonkeyPatch):
    """Without a GPU: on the first one, where threads are by default, each process would take half a gigabyte for itself."""
    steps.extract(plan)
    on: dict[int, torch.device] = {}
    took = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: on.update({threading.get_ident(): device}))
    take_memory = _Buffers.take

    def taken(self: _Buffers, rows: int, width: int) -> np.ndarray:
        took.append(on.get(threading.get_ident()))
        self.gpu = None  # there is none
        return take_memory(self, rows, width)

    monkeypatch.setattr(_Buffers, "take", taken)
    take(reader(plan, device=torch.device("cuda:1")), 2)
    assert set(took) == {torch.device("cuda:1")}


def test_a_copy_is_waited_for_on_the_gpu_that_it_goes_to(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU: which stream is asked for, and what is recorded where."""
    from components.activations.dataset import reader as module

    recorded, waited = [], []

    class Event:
        def record(self, stream: str) -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            waited.append(recorded[-1])

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **named: empty(*shape, **named))
    buffers = module._Buffers(10, torch.device("cuda:1"))
    view = buffers.take(4, 8)
    del view
    assert recorded == ["stream of cuda:1"]
    buffers.take(4, 8)
    assert waited == ["stream of cuda:1"]
