"""Activation datasets on an S3 server that is slow, broken, away or shared; and read there by others."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from seaweed import KEYS, FaultyProxy, Seaweed

from components import steps, storage
from components.activations.dataset import check
from components.activations.dataset.lookup import ActivationLookup
from components.activations.dataset.manifest import Manifest, read_manifest
from components.activations.dataset.reader import ActivationReader
from components.activations.dataset.values import DamagedDatasetError, Values
from components.run.config import parse_config
from components.run.specification import resolve
from components.storage.cache import DiskCache

pytestmark = pytest.mark.integration

SAE = str(Path(sys.executable).parent / "sae")


@pytest.fixture
def tree(tiny_tree: dict, s3: str, tmp_path: Path) -> dict:
    tiny_tree["storage"]["root"] = f"{s3}/{tmp_path.name}"
    tiny_tree["tracking"] = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    return tiny_tree


@pytest.fixture
def config(tree: dict, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def undisturbed(tree: dict, tmp_path: Path) -> Manifest:
    """The same dataset, made on a local disk."""
    return steps.extract(resolve(parse_config({**tree, "storage": {"root": str(tmp_path / "undisturbed")}})))


def extraction(config: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [SAE, "extract", str(config), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def assert_whole(url: str, expected: Manifest) -> None:
    manifest = read_manifest(url)
    assert manifest.shards == expected.shards  # names, rows, checksums
    assert list(check.problems(url, manifest)) == []
    filesystem, path = storage.resolve(url)
    filesystem.invalidate_cache()
    found = {name.removeprefix(f"{path}/") for name in filesystem.find(path)}
    assert found == {"manifest.json", *(shard.name for shard in manifest.shards)}


def test_a_store_that_slows_down_breaks_and_hangs_up_is_waited_for(
    tree: dict, config: Path, s3_server: Seaweed, tmp_path: Path
):
    plan = resolve(parse_config(tree))
    proxy = FaultyProxy(s3_server.port)
    through = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
    with closing(proxy):
        process = extraction(config, **through)
        _, messages = process.communicate()
        assert process.returncode == 0, messages
        checked = subprocess.run(
            [SAE, "data", "check", plan.dataset_url, "--json"], capture_output=True, text=True, env={**os.environ, **through}
        )
    assert set(proxy.met) == {"slow down", "internal error", "hang up", "cut the answer short"}
    assert checked.returncode == 0, checked.stderr
    assert_whole(plan.dataset_url, undisturbed(tree, tmp_path))
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in messages


def test_two_workers_on_one_dataset_share_the_work(tree: dict, config: Path, tmp_path: Path):
    plan = resolve(parse_config(tree))
    steps.prepare_tokens(plan)
    workers = [extraction(config) for _ in range(2)]
    answers = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], answers
    assert json.loads(answers[0][0]) == json.loads(answers[1][0])
    assert_whole(plan.dataset_url, undisturbed(tree, tmp_path))


def test_a_shard_that_another_worker_has_put_is_never_replaced(tree: dict):
    """Another kind of device rounds differently: the manifest must be true of the bytes that are there."""
    from components.activations.dataset import extraction as work_items
    from components.activations.dataset.shard import write_shard_file
    from components.activations.dataset.shuffle import Scattered

    plan = resolve(parse_config(tree))
    work = plan.extraction(steps.prepare_tokens(plan))
    work_items.scatter(work, torch.device("cpu"), range(work.chunks))
    chunks = [work.chunk_url(chunk) for chunk in range(work.chunks)]
    records = Scattered(chunks, work.buckets, work.layout).read(1)
    records[:, 16] ^= 1  # the last bit of the first activation of every row
    url = f"{work.url}/{work.shard_name(1)}"
    with storage.whole_file(url) as path:
        write_shard_file(
            records, work.layout, seed=0, rows_per_group=512, compression="none", path=path, name=work.shard_name(1)
        )
    theirs = storage.read_bytes(url)
    manifest = steps.extract(plan)
    assert storage.read_bytes(url) == theirs
    assert list(check.problems(work.url, manifest)) == []


def test_pyarrow_alone_reads_the_dataset_from_the_bucket(tree: dict, s3_server: Seaweed):
    plan = resolve(parse_config(tree))
    manifest = steps.extract(plan)
    filesystem = pyarrow.fs.S3FileSystem(
        access_key=KEYS["AWS_ACCESS_KEY_ID"],
        secret_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=f"127.0.0.1:{s3_server.port}",
        scheme="http",
        region="us-east-1",
    )
    files = [f"{plan.dataset_url.removeprefix('s3://')}/{shard.name}" for shard in manifest.shards]
    table = pyarrow.dataset.dataset(files, filesystem=filesystem, format="parquet").to_table()
    assert len(table) == manifest.tokens
    one = pq.read_table(files[0], filesystem=filesystem)
    x = np.frombuffer(one["resid_post.1"].combine_chunks().buffers()[1], np.float16).reshape(len(one), -1)
    lookup = ActivationLookup(Values(plan.dataset_url, manifest))
    found = lookup(one["document"].to_pylist()[:50], one["position"].to_pylist()[:50], "resid_post.1")
    assert (found.numpy() == x[:50]).all()


def test_a_second_epoch_comes_from_the_cache_and_a_missing_shard_is_named(tree: dict, tmp_path: Path):
    plan = resolve(parse_config(tree))
    manifest = steps.extract(plan)

    def epoch(cache: DiskCache | None) -> list[torch.Tensor]:
        reader = ActivationReader(
            url=plan.dataset_url, manifest=manifest, columns=("resid_post.1",), batch_size=500, seed=0, cache=cache
        )
        with closing(reader.batches()) as batches:
            return [next(batches)["resid_post.1"].clone() for _ in range(12)]

    cache = DiskCache(str(tmp_path / "cache"), 10_000_000)
    first = epoch(cache)
    held = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in held) == 6_000 * 64
    for shard in manifest.shards:
        storage.delete(f"{plan.dataset_url}/{shard.name}")
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(cache), strict=True))
    held[0].write_bytes(bytes(held[0].stat().st_size))  # a cache that lies is not believed
    with pytest.raises(DamagedDatasetError, match=r"s3://acts/.*/shard-.*\.parquet is missing"):
        epoch(cache)
    with pytest.raises(DamagedDatasetError, match=r"s3://acts/.*/shard-.*\.parquet is missing"):
        epoch(None)


def test_a_server_that_is_killed_and_comes_back_interrupts_nothing(
    tree: dict, config: Path, s3_server: Seaweed, tmp_path: Path
):
    plan = resolve(parse_config(tree))
    process = extraction(config)
    while process.poll() is None and not storage.list_names(f"{plan.dataset_url}/scatter/32"):
        time.sleep(0.01)
    s3_server.kill()
    time.sleep(12)  # longer than botocore alone would try
    s3_server.start()
    s3_server.wait_until_ready()
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert "trying again" in messages
    assert_whole(plan.dataset_url, undisturbed(tree, tmp_path))


@pytest.mark.parametrize(
    "kills", [4, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(3_000)])], ids=["short", "campaign"]
)
def test_kill_9_of_a_worker_of_all_or_of_the_server_at_random_moments(
    tree: dict, config: Path, s3_server: Seaweed, tmp_path: Path, kills: int
):
    """Two workers on one dataset; each time one of them, both, or the S3 server is killed, and all are started again."""
    tree["corpus"]["train_tokens"] = 40_000
    tree["activations"] |= {"sequences_per_chunk": 8}
    config.write_text(yaml.safe_dump(tree))
    plan = resolve(parse_config(tree))
    expected = undisturbed(tree, tmp_path)
    draw = random.Random(0)
    done = {"a worker": 0, "all workers": 0, "the S3 server": 0}
    workers: list[subprocess.Popen] = []
    ended = 0
    while sum(done.values()) < kills:
        for worker in workers:
            assert worker.poll() in (None, 0, -signal.SIGKILL), worker.communicate()[1]
        workers = [worker for worker in workers if worker.poll() is None]
        if read_manifest(plan.dataset_url) is not None:  # finished: to the next dataset, from the start
            for worker in workers:
                assert worker.wait() in (0, -signal.SIGKILL), worker.communicate()[1]
            assert_whole(plan.dataset_url, expected)
            storage.delete(plan.dataset_url)
            workers, ended = [], ended + 1
        while len(workers) < 2:
            workers.append(extraction(config))
        before = storage.list_names(f"{plan.dataset_url}/scatter/8")
        while (
            all(worker.poll() is None for worker in workers) and storage.list_names(f"{plan.dataset_url}/scatter/8") == before
        ):
            time.sleep(0.01)  # until something is done: a worker takes seconds to start
        time.sleep(draw.uniform(0, 2))
        victim = ["a worker", "all workers", "the S3 server"][sum(done.values()) % 3]
        if victim == "the S3 server":
            s3_server.kill()
            time.sleep(draw.uniform(0, 2))
            s3_server.start()
            s3_server.wait_until_ready()
        else:
            for worker in workers[: 1 if victim == "a worker" else 2]:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
        done[victim] += 1
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    steps.extract(plan)
    assert_whole(plan.dataset_url, expected)
    print(f"killed {done}; {ended} datasets were finished meanwhile")
