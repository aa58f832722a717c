"""Online training: the language model runs beside it, and what comes of it is what training from disk gives."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from components import steps, storage
from components.activations.dataset import extraction
from components.activations.dataset.manifest import require_manifest
from components.activations.dataset.reader import ActivationReader
from components.activations.online.folder import Failure, OnlineFolder, Wanted
from components.activations.online.production import cut
from components.activations.online.reader import GenerationReader
from components.activations.online.space import Space
from components.activations.online.stream import stretches
from components.corpus.manifest import TokenShard, TokenSplit
from components.corpus.tokens import read_sequences
from components.run.checks import check
from components.run.config import parse_config
from components.run.online import generation, production_of
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.training.process import CONTINUE

POINT = "resid_post.1"
NAMES = ("document", "position", POINT)
GENERATION = 2_000
MIXED = 2


def online(tree: dict, disk_bytes: int = 10**9, generation_tokens: int = GENERATION, **training) -> Specification:
    activations = {**tree["activations"], "rows_per_shard": 1_000, "rows_per_group": 256, "sequences_per_chunk": 16}
    activations |= {"mode": "online", "generation_tokens": generation_tokens, "generations_mixed": MIXED}
    activations["disk_bytes"] = disk_bytes
    return resolve(parse_config({**tree, "activations": activations, "training": {**tree["training"], **training}}))


@pytest.fixture
def made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations are made by a thread: a process takes seconds to start. What it does is the same."""

    @contextmanager
    def producing(run: Specification) -> Iterator[None]:
        folder, stop = OnlineFolder(run.dataset_url), threading.Event()
        folder.fail(None)

        def work() -> None:
            try:
                production_of(run, run.token_manifest()).run(stop.is_set)
            except Exception as error:
                folder.fail(Failure(kind=type(error).__name__, text=str(error)))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    monkeypatch.setattr(steps.online, "producing", producing)


def least(run: Specification) -> int:
    """The smallest `disk_bytes` that is accepted."""
    found = space(run)
    return found.making + MIXED * found.kept


def space(run: Specification) -> Space:
    return production_of(run, run.token_manifest()).space


def weights(run: Specification) -> bytes:
    return storage.read_bytes(f"{run.sae_url}/sae_weights.safetensors")


def rows_of(batch: dict[str, torch.Tensor]) -> np.ndarray:
    return np.stack([batch["document"].numpy(), batch["position"].numpy().astype(np.int64)])


@pytest.mark.usefixtures("made_here")
def test_one_generation_of_everything_gives_the_weights_of_training_from_disk(tiny_tree: dict):
    one = online(tiny_tree, generation_tokens=10_000)
    tiny_tree["activations"] |= {"rows_per_shard": 1_000, "rows_per_group": 256}
    stored = resolve(parse_config(tiny_tree))
    steps.extract(stored)
    steps.train(stored)
    steps.train(one)
    assert weights(one) == weights(stored)
    assert one.sae_digest != stored.sae_digest
    assert OnlineFolder(one.dataset_url).present() == []


def test_generations_follow_each_other_as_if_each_were_read_alone(tiny_tree: dict, tmp_path: Path):
    run = online(tiny_tree)
    tokens = steps.prepare_tokens(run)
    folder, count = OnlineFolder(run.dataset_url), production_of(run, tokens).count
    assert count == 4
    folder.begin(count)
    folder.want(Wanted(training="", first=0, rows=30_000))
    production_of(run, tokens).run()
    epochs: list[dict[str, torch.Tensor]] = []
    for epoch in range(3):
        for number in range(count):
            url = folder.generation_url(number)
            manifest = require_manifest(url)
            alone = ActivationReader(url=url, manifest=manifest, columns=NAMES, batch_size=manifest.tokens, seed=0)
            with closing(alone.batches(epoch * manifest.tokens)) as batches:
                epochs.append(next(batches))
    stream = {name: torch.cat([part[name] for part in epochs]) for name in NAMES}
    reader = GenerationReader(folder=folder, manifest=folder.first_manifest(), columns=NAMES, batch_size=250, seed=0)
    for start in (0, 250, 1_500, 5_750, 6_000, 14_000):
        with closing(reader.batches(start)) as batches:
            for at in range(start, start + 3_000, 250):
                batch = next(batches)
                for name in NAMES:
                    assert torch.equal(batch[name], stream[name][at : at + 250]), (start, at, name)
    # Every token of the split is in each epoch once.
    split = tokens.splits["train"]
    held = read_sequences(run.token_url, tokens, "train", 0, split.sequences)
    counted = held.documents >= 0
    known = np.stack([held.documents[counted], held.positions[counted]])
    for epoch in range(3):
        found = rows_of({name: stream[name][epoch * split.tokens : (epoch + 1) * split.tokens] for name in NAMES})
        assert np.array_equal(found[:, np.lexsort(found)], known[:, np.lexsort(known)])


@pytest.mark.parametrize("mixed", [2, 3, 9])
def test_of_mixed_generations_every_token_is_read_once_in_each_pass_from_any_row_on(tiny_tree: dict, mixed: int):
    run = online(tiny_tree, generation_tokens=1_000)
    tokens = steps.prepare_tokens(run)
    folder, count, rows = OnlineFolder(run.dataset_url), production_of(run, tokens).count, tokens.splits["train"].tokens
    assert count > 6
    folder.begin(count, mixed)
    folder.want(Wanted(training="", first=0, rows=2 * rows))
    production_of(run, tokens).run()
    reader = GenerationReader(
        folder=folder, manifest=folder.first_manifest(), columns=NAMES, batch_size=rows // 10, seed=0, leads=False
    )
    size = reader.batch_size
    with closing(reader.batches()) as batches:
        read = [next(batches) for _ in range(21)]
    for start in (1, 3, 9, 10, 17):
        with closing(reader.batches(start * size)) as batches:
            for batch in read[start : start + 3]:
                again = next(batches)
                assert all(torch.equal(again[name], batch[name]) for name in NAMES)
    stream = {name: torch.cat([batch[name] for batch in read]) for name in NAMES}
    held = read_sequences(run.token_url, tokens, "train", 0, tokens.splits["train"].sequences)
    counted = held.documents >= 0
    known = np.stack([held.documents[counted], held.positions[counted]])
    passes = [rows_of({name: values[first : first + rows] for name, values in stream.items()}) for first in (0, rows)]
    for found in passes:
        assert np.array_equal(found[:, np.lexsort(found)], known[:, np.lexsort(known)])
    assert not np.array_equal(*passes)
    # In the middle of a pass a batch is of about equal parts of `mixed` generations.
    home = {}
    for number in range(count):
        manifest = require_manifest(folder.generation_url(number))
        whole = ActivationReader(
            url=folder.generation_url(number), manifest=manifest, columns=NAMES, batch_size=manifest.tokens, seed=0
        )
        with closing(whole.batches()) as batches:
            home |= {tuple(row): number for row in rows_of(next(batches)).T.tolist()}
    middle = rows_of({name: values[rows // 2 : rows // 2 + 250] for name, values in stream.items()})
    shares = np.bincount([home[tuple(row)] for row in middle.T.tolist()], minlength=count)
    assert (shares > 0).sum() >= min(mixed, count)
    # The place from which on generations are needed is never after the first that is read.
    for start in range(0, 2 * rows, 97):
        first = home[tuple(rows_of({name: values[start : start + 1] for name, values in stream.items()})[:, 0].tolist())]
        assert folder.place_of(start) <= first + count * (start // rows)


@pytest.mark.parametrize(("generations", "mixed"), [(1, 1), (1, 4), (5, 1), (5, 2), (5, 5), (3, 8), (12, 4)])
def test_the_stretches_of_a_pass_hold_each_row_of_each_generation_once(generations: int, mixed: int):
    rows = [100 + 7 * number for number in range(generations)]
    taken: list[tuple[int, int]] = []
    for stretch in stretches(generations, mixed, rows.__getitem__):
        if stretch.before >= 2 * sum(rows):
            break
        assert stretch.before == len(taken)
        assert len(stretch.parts) <= mixed
        assert [part.place for part in stretch.parts] == sorted(part.place for part in stretch.parts)
        for part in stretch.parts:
            taken += [(part.place, row) for row in range(part.first, part.stop)]
            assert part.ends == (part.stop == rows[part.place % generations])
    assert len(taken) == 2 * sum(rows)
    assert set(taken) == {(place, row) for place in range(2 * generations) for row in range(rows[place % generations])}
    assert {place for place, _ in taken[: sum(rows)]} == set(range(generations))


class Killed(Exception):
    pass


def stopping_after(tokens: int) -> Callable[[list[dict]], None]:
    def on_points(points: list[dict]) -> None:
        if points[-1]["tokens"] >= tokens:
            raise Killed

    return on_points


@pytest.mark.usefixtures("made_here")
def test_killed_at_any_moment_and_continued_it_ends_with_the_same_weights(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    steps.prepare_tokens(online(tiny_tree))
    run = online(tiny_tree, disk_bytes=least(online(tiny_tree)), tokens=12_000, log_tokens=500)
    record = steps.train(run)
    undisturbed = weights(run)
    storage.delete(run.sae_url)
    storage.delete(run.dataset_url)
    run_chunk, calls = extraction.run_chunk, [0]

    def killed_now_and_then(source, model, points, sequences, *rest):
        calls[0] += 1
        if calls[0] in (3, 10, 17):
            raise Killed("in the middle of a generation")
        return run_chunk(source, model, points, sequences, *rest)

    monkeypatch.setattr(extraction, "run_chunk", killed_now_and_then)
    stops = [500, 2_500, 5_500, 6_000, 10_500]
    interrupted: list[str] = []
    for _ in range(40):
        try:
            found = steps.train(run, stopping_after(stops[0]) if stops else lambda points: None)
            break
        except Killed:
            stops.pop(0)
        except RuntimeError as error:
            interrupted.append(str(error))
    assert stops == []
    assert interrupted == ["extraction failed: Killed: in the middle of a generation"] * 3
    assert weights(run) == undisturbed
    assert found.curves == record.curves
    assert storage.list_names(f"{run.sae_url}/checkpoints") == []
    assert OnlineFolder(run.dataset_url).present() == []


@pytest.mark.usefixtures("made_here")
def test_the_disk_never_holds_more_than_it_may(tiny_tree: dict):
    steps.prepare_tokens(online(tiny_tree))
    bound = least(online(tiny_tree))
    run = online(tiny_tree, disk_bytes=bound, tokens=14_000)
    most, counts, ended = [0], [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.001):
            sizes: dict[int, int] = {}
            there = 0
            for folder, folders, names in os.walk(run.dataset_url):
                there += sum(name.startswith("generation-") for name in folders)
                for name in names:
                    with suppress(FileNotFoundError):
                        status = os.stat(os.path.join(folder, name))
                        sizes[status.st_ino] = status.st_size  # a shard has two names while it is put
            most[0], counts[0] = max(most[0], sum(sizes.values())), max(counts[0], there)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        steps.train(run)
    finally:
        ended.set()
        sampler.join()
    assert counts[0] == MIXED + 1
    # The row count of a generation times the bytes of a row: what was seen is about what there was.
    rows = 6_000 / 4
    assert (MIXED + 1) * rows * run.extraction(run.token_manifest()).layout.row_bytes < most[0] <= bound


@pytest.mark.usefixtures("made_here")
def test_what_counts_and_by_what_it_is_scaled_is_found_once_and_holds_for_all_generations(tiny_tree: dict):
    tiny_tree["activations"]["exclude"] = {"norms_above": 1.2, "positions": [0]}
    run = online(tiny_tree)
    record = steps.train(run)
    first, tokens = run.dataset_manifest(), run.token_manifest()
    assert {name: first.identity[name] for name in run.dataset_identity} == run.dataset_identity
    assert first.identity["generation"]["number"] == 0
    assert record.activation_scale == first.column(POINT).scale
    folder = OnlineFolder(run.dataset_url)
    rows = [entry.rows for entry in folder.ledger().entries]
    stored = resolve(parse_config({**tiny_tree}))
    whole = steps.extract(stored)
    assert sum(rows) == whole.tokens < tokens.splits["train"].tokens
    assert first.exclusion == whole.exclusion


def test_a_process_that_makes_them_and_is_killed_ends_the_training_which_says_so(tiny_tree: dict):
    steps.prepare_tokens(online(tiny_tree))
    short = {"checkpoint_tokens": 500, "log_tokens": 1_000}
    run = online(tiny_tree, disk_bytes=least(online(tiny_tree)), tokens=1_000_000, **short)

    def producers() -> list[psutil.Process]:
        found = []
        for one in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # or a zombie
                found += [one] * ("components.run.online" in one.cmdline())
        return found

    def kill(points: list[dict]) -> None:
        for producer in producers():
            producer.kill()

    with pytest.raises(RuntimeError, match=r"extracts was killed \(signal 9\)"):
        steps.train(run, kill)
    assert producers() == []
    assert storage.list_names(f"{run.sae_url}/checkpoints")


@pytest.mark.usefixtures("made_here")
def test_it_is_asked_to_stop_while_it_waits_and_stops(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    from components.training.loop import Stopped

    run = online(tiny_tree)
    asked = threading.Event()
    monkeypatch.setattr(extraction, "run_chunk", lambda *_: asked.wait(30))
    threading.Timer(0.3, asked.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        steps.train(run, should_stop=asked.is_set)
    assert time.monotonic() - started < 20


REFUSED = {
    "no size": ({"generation_tokens": None}, {}, "activations.generation_tokens: activations.mode 'online' needs it"),
    "no bound": ({"disk_bytes": None}, {}, "activations.disk_bytes: activations.mode 'online' needs it"),
    "smaller than a batch": (
        {},
        {"batch_size": 4_000},
        "activations.generation_tokens: 2,000 is less than training.batch_size",
    ),
    "smaller than a shard": ({"rows_per_shard": 3_000}, {}, "is less than activations.rows_per_shard (3,000)"),
    "too little disk": ({"disk_bytes": 300_000}, {}, "activations.disk_bytes: 300,000 do not hold a generation"),
    "held out": ({"split": "held_out"}, {}, "activations.mode: 'online' makes what is trained on"),
    "no meaning": ({"mode": "stored"}, {}, "has no meaning with activations.mode 'stored'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(tiny_tree: dict, name: str):
    activations, training, said = REFUSED[name]
    base = {"rows_per_shard": 1_000, "mode": "online", "generation_tokens": GENERATION, "disk_bytes": 10**8}
    tree = {
        **tiny_tree,
        "activations": {**tiny_tree["activations"], **base, **activations},
        "training": {**tiny_tree["training"], **training},
    }
    with pytest.raises(UserError) as refused:
        check(resolve(parse_config(tree)), only_data=name == "held out")
    assert said in str(refused.value)


def test_the_least_disk_that_is_asked_for_is_enough(tiny_tree: dict):
    run = online(tiny_tree)
    steps.prepare_tokens(run)
    check(online(tiny_tree, disk_bytes=least(run)))
    with pytest.raises(UserError, match=f"give at least {least(run):,}"):
        check(online(tiny_tree, disk_bytes=least(run) - 1))


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize(
    ("sequences", "context", "tokens"),
    [(194, 32, 2_000), (1, 32, 2_000), (1_000, 128, 128), (7, 10, 45), (90_000, 32, 32 * 7_000)],
)
def test_generations_are_together_all_and_each_of_the_whole_corpus(sequences: int, context: int, tokens: int, shards: int):
    shard = TokenShard(name="train-00000.parquet", sequences=1, bytes=1, sha256="0" * 64)
    found = cut(TokenSplit(tokens=1, sequences=sequences, documents=1, shards=(shard,) * shards), context, tokens)
    taken = [[one for first, stop in found.generation(number) for one in range(first, stop)] for number in range(found.count)]
    assert sorted(one for some in taken for one in some) == list(range(sequences))
    sizes = [len(some) for some in taken]
    assert min(sizes) > 0
    assert max(sizes) * context <= tokens
    assert max(sizes) == found.largest
    if found.count > 1 and min(sizes) > 40:
        # As evenly spread as a sample without a pattern: each tenth of the corpus gives about a tenth.
        for some in taken:
            tenths = np.bincount(np.array(some) * 10 // sequences, minlength=10)
            assert tenths.min() > 0.5 * len(some) / 10


def test_the_dataset_of_a_generation_is_one_as_any_other(tiny_tree: dict):
    run = online(tiny_tree)
    tokens = steps.prepare_tokens(run)
    work = generation(run, tokens, 1)
    manifest = extraction.extract(work, run.device)
    from components.activations.dataset.check import problems

    assert list(problems(work.url, manifest)) == []
    assert manifest.digest == work.digest


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_25_kills_at_random_moments_change_no_weight(tiny_tree: dict, tmp_path: Path):
    """SIGKILL and SIGTERM to `sae train`, with nobody left behind, and SIGKILL to the process that extracts."""
    steps.prepare_tokens(online(tiny_tree))
    run = online(tiny_tree, disk_bytes=least(online(tiny_tree)), tokens=1_500_000, checkpoint_tokens=20_000, log_tokens=200_000)
    steps.train(run)
    undisturbed = weights(run)
    storage.delete(run.sae_url)
    storage.delete(run.dataset_url)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run.config.model_dump(mode="json")))
    command, chance = [str(Path(sys.executable).parent / "sae"), "train", str(config)], random.Random(0)

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def extracting(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(process.pid).children()
        return []

    kills = {"SIGKILL": 0, "SIGTERM": 0, "extraction": 0}
    while sum(kills.values()) < 25:
        process = started()
        while not extracting(process):  # its imports take the time that the machine gives
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 12))
        assert process.poll() is None, f"it has ended after {kills}; give it more to do"
        children, kind = extracting(process), chance.choice(list(kills))
        if kind == "extraction":
            for child in children:
                child.kill()
            assert process.wait(60) == 1
        else:
            process.send_signal(getattr(signal, kind))
            assert process.wait(60) == {"SIGKILL": -signal.SIGKILL, "SIGTERM": CONTINUE}[kind]
        assert psutil.wait_procs(children, timeout=20)[1] == []
        kills[kind] += 1
    process = started()
    assert process.wait(600) == 0
    assert weights(run) == undisturbed
    assert OnlineFolder(run.dataset_url).present() == []
    assert min(kills.values()) > 3
