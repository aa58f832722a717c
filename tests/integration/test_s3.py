"""The whole line on a real S3 server: SeaweedFS on loopback, with keys from the environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from backports import zstd
from seaweed import LIMITED

from components import steps, storage
from components.corpus.documents import Document
from components.corpus.settings import CorpusSettings
from components.corpus.sources import corpus_content, list_corpus, read_documents
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError

pytestmark = pytest.mark.integration

BIN = Path(sys.executable).parent


def corpus_identity(settings):
    return corpus_content(settings, list_corpus(settings))


@pytest.fixture
def tree(tiny_tree: dict, s3: str, tmp_path: Path) -> dict:
    tiny_tree["storage"]["root"] = f"{s3}/{tmp_path.name}"
    tiny_tree["tracking"]["uri"] = f"sqlite:///{tmp_path}/mlflow.db"
    return tiny_tree


def line(tree: dict) -> tuple[Specification, dict]:
    plan = resolve(parse_config(tree))
    steps.extract(plan)
    steps.train(plan)
    steps.evaluate(plan)
    steps.interpret(plan)
    with steps.tracked(plan, {}) as run:
        return plan, steps.register(plan, run)


def test_the_line_on_s3_gives_the_same_bytes_as_on_a_local_disk(tree: dict, tmp_path: Path):
    remote, outcome = line(tree)
    assert outcome.alias == "champion"
    local, _ = line({**tree, "storage": {"root": str(tmp_path / "local")}, "tracking": {"gates": tree["tracking"]["gates"]}})
    assert remote.dataset_manifest() == local.dataset_manifest()
    assert remote.training_record().weights_sha256 == local.training_record().weights_sha256
    assert remote.evaluation_record().metrics == local.evaluation_record().metrics
    for shard in remote.dataset_manifest().shards:
        assert storage.read_bytes(f"{remote.dataset_url}/{shard.name}") == storage.read_bytes(
            f"{local.dataset_url}/{shard.name}"
        )
    assert storage.list_names(f"{remote.dataset_url}/scatter") == []
    assert storage.list_names(f"{remote.sae_url}/checkpoints") == []
    assert steps.finished_run(remote) is not None


def test_a_corpus_in_a_bucket_is_read_by_a_glob(s3: str, tmp_path: Path):
    """The same documents under the same names as from a local copy, and another identity where an object changes."""
    local, remote = tmp_path / "corpus", f"{s3}/{tmp_path.name}-corpus"
    for number in range(6):
        folder = local / f"part-{number % 2}" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        texts = [f"text {number}-{row} " + "word " * row for row in range(50)]
        if number < 3:
            with zstd.open(folder / f"{number}.jsonl.zst", "wt") as stream:
                stream.write("\n".join(json.dumps({"text": text}) for text in texts))
        else:
            pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet", row_group_size=16)
    for path in local.rglob("*.*"):
        storage.put_bytes(path.read_bytes(), f"{remote}/{path.relative_to(local).as_posix()}")
    storage.put_bytes(b"\xff\xfe", f"{remote}/not-matched.bin")

    def chosen(root: str) -> CorpusSettings:
        return CorpusSettings(source="files", paths=(f"{root}/**/*.jsonl.zst", f"{root}/**/*.parquet"))

    def documents(root: str) -> list[Document]:
        [(field, source)] = chosen(root).sources
        return list(read_documents(source, field, 0))

    assert len(documents(str(local))) == 300
    assert documents(remote) == documents(str(local))
    before = corpus_identity(chosen(remote))
    assert before == corpus_identity(chosen(remote))
    storage.put_bytes(storage.read_bytes(f"{remote}/part-1/deep/3.parquet"), f"{remote}/part-1/deep/3.parquet")
    assert corpus_identity(chosen(remote)) == before, "the same bytes put again are the same corpus"
    storage.put_bytes(storage.read_bytes(f"{remote}/part-0/deep/4.parquet"), f"{remote}/part-1/deep/3.parquet")
    assert corpus_identity(chosen(remote)) != before
    with pytest.raises(UserError, match=r"corpus\.paths: '.*nowhere.*' names no file"):
        documents(f"{remote}/nowhere")
    code = f"from components.corpus.listing import find_files\nfind_files(('{remote}/**/*.parquet',), 'corpus.paths')"
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong-secret-27182"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "UserError: corpus.paths: cannot read" in done.stderr
    assert "secret-" not in done.stderr


def test_of_many_writers_on_s3_exactly_one_commits(s3: str, tmp_path: Path):
    url = f"{s3}/{tmp_path.name}/manifest.json"
    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(lambda writer: storage.put_json_once({"writer": writer}, url), range(16)))
    assert sum(won) == 1
    assert storage.read_json(url) == {"writer": won.index(True)}


def test_killed_on_s3_the_extraction_continues_to_the_same_bytes(tree: dict, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    plan = resolve(parse_config(tree))
    moments = {
        "a chunk is there": lambda: storage.list_names(f"{plan.dataset_url}/scatter/32") != [],
        "a shard is there": lambda: any(name.startswith("shard-") for name in storage.list_names(plan.dataset_url)),
    }
    for moment, reached in moments.items():
        process = subprocess.Popen(
            [str(BIN / "sae"), "extract", str(config)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not reached():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before {moment}"
    manifest = steps.extract(plan)
    undisturbed = resolve(parse_config({**tree, "storage": {"root": str(tmp_path / "local")}}))
    assert steps.extract(undisturbed).shards == manifest.shards
    shutil.rmtree(tmp_path / "local")


def test_a_rival_that_starts_late_waits_and_one_training_makes_one_artifact(tree: dict, tmp_path: Path):
    tree["training"] |= {"tokens": 800_000, "checkpoint_tokens": 40_000}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    plan = resolve(parse_config(tree))
    steps.extract(plan)

    def trainer(log: Path) -> subprocess.Popen:
        with log.open("w") as stderr:
            command = [str(BIN / "sae"), "train", str(config), "--json"]
            return subprocess.Popen(command, stdout=-1, stderr=stderr, text=True)

    logs = [tmp_path / "first.log", tmp_path / "rival.log"]

    def newest() -> int:
        names = storage.list_names(f"{plan.sae_url}/checkpoints")
        return max((int(found[1]) for name in names if (found := re.search(r"step-(\d+)", name))), default=0)

    first, seen = trainer(logs[0]), [0]
    while seen[-1] == 0:
        assert first.poll() is None, logs[0].read_text()
        seen.append(newest())
    # A fast machine would end the first while the rival still starts: it is held, for less than it takes to be thought dead.
    first.send_signal(signal.SIGSTOP)
    try:
        rival = trainer(logs[1])
        until = time.monotonic() + 60
        while "waiting for another process that works on" not in " ".join(logs[1].read_text().split()):
            assert rival.poll() is None, logs[1].read_text()
            assert time.monotonic() < until, logs[1].read_text()
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGCONT)
    while first.poll() is None:
        step = newest()
        finished = storage.exists(f"{plan.sae_url}/training.json")
        assert finished or step >= seen[-1], "a newer checkpoint was deleted"
        seen.append(max(step, seen[-1]))
    results = [process.communicate(timeout=120) for process in (first, rival)]
    assert [first.returncode, rival.returncode] == [0, 0], [log.read_text() for log in logs]
    assert len(set(seen)) > 3
    digests = {json.loads(out)["weights_sha256"] for out, _ in results}
    undisturbed = resolve(parse_config({**tree, "storage": {"root": str(tmp_path / "local")}}))
    steps.extract(undisturbed)
    assert digests == {steps.train(undisturbed).weights_sha256} == {plan.training_record().weights_sha256}
    assert storage.list_names(f"{plan.sae_url}/claims") == storage.list_names(f"{plan.sae_url}/checkpoints") == []


def test_wrong_keys_are_one_sentence_without_a_secret(tree: dict, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong-secret-27182"}
    done = subprocess.run([str(BIN / "sae"), "extract", str(config)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert "storage.root" in done.stderr
    assert tree["storage"]["root"] in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret-" not in done.stderr


def test_a_bucket_that_does_not_exist_is_one_sentence(tree: dict, tmp_path: Path):
    """With keys that may not make buckets: SeaweedFS makes a missing one for an administrator."""
    tree["storage"]["root"] = "s3://no-such-bucket/runs"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [str(BIN / "sae"), "extract", str(config)], capture_output=True, text=True, env={**os.environ, **LIMITED}
    )
    assert done.returncode == 2, done.stderr
    assert "storage.root: cannot write to 's3://no-such-bucket/runs'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret-" not in done.stderr


def test_generations_on_s3_come_and_go_and_give_the_weights_of_a_local_disk(tree: dict, tmp_path: Path):
    tree["activations"] |= {"rows_per_shard": 1_000, "mode": "online", "generation_tokens": 2_000, "disk_bytes": 2 * 10**6}
    tree["training"]["tokens"] = 8_000
    remote = resolve(parse_config(tree))
    local = resolve(parse_config({**tree, "storage": {"root": str(tmp_path / "local")}}))
    assert steps.train(remote).weights_sha256 == steps.train(local).weights_sha256
    filesystem, path = storage.resolve(remote.dataset_url)
    left = {name.rsplit("/", 1)[-1] for name in filesystem.find(path)}
    assert left == {"first.json", "ledger.json", "wanted.json"}
    assert remote.dataset_manifest() == local.dataset_manifest()
    assert storage.read_json(f"{remote.dataset_url}/ledger.json")["generations"] == 4
