"""A file is whole or absent, and a commit has one winner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components import storage
from components.settings import UserError
from components.storage import locks, staging


def test_an_exception_while_writing_leaves_the_old_content(tmp_path: Path):
    url = str(tmp_path / "file")
    storage.put_bytes(b"old", url)
    with pytest.raises(RuntimeError), storage.whole_file(url) as path:
        path.write_bytes(b"half of the n")
        raise RuntimeError
    assert storage.read_bytes(url) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_of_many_writers_exactly_one_commits(tmp_path: Path):
    url = str(tmp_path / "manifest.json")
    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(lambda writer: storage.put_json_once({"writer": writer}, url), range(16)))
    assert sum(won) == 1
    assert storage.read_json(url) == {"writer": won.index(True)}


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path):
    code = f"""
import os, signal
from components import storage
with storage.whole_file({str(tmp_path / "a")!r}) as path:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    (left,) = tmp_path.iterdir()
    assert storage.list_names(str(tmp_path)) == []
    with storage.whole_file(str(tmp_path / "b")) as path:
        path.write_bytes(b"going on")
        storage.sweep(str(tmp_path))
        assert path.exists()
    assert not left.exists()
    assert storage.list_names(str(tmp_path)) == ["b"]


def test_a_root_that_cannot_be_written_is_named():
    with pytest.raises(UserError, match=r"storage\.root.*/proc/none"):
        storage.require_writable("/proc/none", "storage.root")


def test_a_read_that_gives_less_than_asked_for_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = os.urandom(10_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    whole = os.preadv

    def short(descriptor: int, targets: list, offset: int) -> int:
        first = [target[:700] for target in targets if len(target)][:1]
        return whole(descriptor, first, offset)

    monkeypatch.setattr(os, "preadv", short)
    got = bytearray(9_000)
    targets = [memoryview(got)[:1], memoryview(got)[1:1], memoryview(got)[1:4_000], memoryview(got)[4_000:]]
    storage.fill(str(path), targets, 500)
    assert got == content[500:9_500]
    again = bytearray(9_000)
    storage.read_ranges([(str(path), 500, memoryview(again))])
    assert again == got
    with pytest.raises(EOFError, match="file ends before byte 10001"):
        storage.fill(str(path), [memoryview(bytearray(10_001))], 0)


def test_a_part_beyond_2_gib_is_read_although_one_call_gives_less(tmp_path: Path):
    path, length = tmp_path / "part", 1 << 24
    with path.open("wb") as file:
        file.seek(129 * length - 3)  # Linux gives 2,147,479,552 bytes at most
        file.write(b"end")
    target = memoryview(bytearray(length))
    storage.fill(str(path), [target] * 129, 0)
    assert bytes(target[-4:]) == b"\0end"


def test_a_file_of_another_machines_process_or_of_a_pid_used_again_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def left(**changed: Callable[..., str]) -> Path:
        with monkeypatch.context() as other:
            for name, value in changed.items():
                other.setattr(staging, name, value)
            with staging.staged_beside(tmp_path / "a") as path:
                path.write_bytes(b"half")
                kept = path.rename(tmp_path / f"{path.name}")
                content = kept.read_bytes()
        kept.write_bytes(content)
        return kept

    elsewhere = left(_processes=lambda: "0123456789ab")
    storage.sweep(str(tmp_path))
    assert elsewhere.exists(), "a process in another PID namespace may have our PID, and be alive"
    os.utime(elsewhere, (time.time() - 90_000,) * 2)
    reused = left(_started=lambda pid: "1")
    mine = left()
    storage.sweep(str(tmp_path))
    assert not elsewhere.exists()
    assert not reused.exists()
    assert mine.exists()


def shared() -> str:
    """On an object store in memory, without a lock of the operating system."""
    return f"memory://claims-{uuid.uuid4().hex}/sae"


def test_a_claim_is_held_by_one_and_waited_for_by_the_others():
    url, holders, most = shared(), 0, []

    def work(_: int) -> None:
        nonlocal holders
        with storage.claimed(url, beat_seconds=0.05, dead_seconds=5) as claim:
            holders += 1
            most.append(holders)
            time.sleep(0.1)
            claim.check(now=True)
            holders -= 1

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(work, range(5)))
    assert most == [1] * 5
    assert storage.list_names(f"{url}/claims") == []


def test_a_holder_whose_beat_stops_loses_the_claim_and_is_told(monkeypatch: pytest.MonkeyPatch):
    url, rival_holds, slow_is_done = shared(), threading.Event(), threading.Event()

    def rival() -> None:
        with storage.claimed(url, beat_seconds=0.1, dead_seconds=0.8) as claim:
            rival_holds.set()
            assert slow_is_done.wait(20)
            claim.check(now=True)

    with ThreadPoolExecutor(1) as threads:
        with storage.claimed(url, beat_seconds=0.1, dead_seconds=0.8) as slow:
            done = threads.submit(rival)
            assert not rival_holds.wait(2), "a beat that goes on is not overtaken"
            slow.check(now=True)
            slow._ended.set()  # as a process that is stopped
            assert rival_holds.wait(20)
            with pytest.raises(storage.ClaimLost, match="another process has taken over"):
                slow.check(now=True)
        assert storage.list_names(f"{url}/claims") != [], "what the rival holds is not taken from it"
        slow_is_done.set()
        done.result()
    with pytest.raises(storage.ClaimLost):
        slow.check(now=True)
    assert storage.list_names(f"{url}/claims") == []


def test_time_in_which_the_store_was_away_does_not_count_against_a_holder(monkeypatch: pytest.MonkeyPatch):
    """Its clock and its pauses are ours here: the store answers once in an hour."""
    url, now = shared(), [0.0]
    storage.put_json_once({}, f"{url}/claims/00001.json")
    looks = []

    def pause(seconds: float) -> None:
        looks.append(now[0])
        now[0] += 3_600

    monkeypatch.setattr(locks.time, "sleep", pause)
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    assert locks._free_number(f"{url}/claims", 20, 90) == 2
    assert len(looks) >= 9  # each look stands for ten seconds at most


def test_a_claim_on_a_local_disk_is_the_systems_lock(tmp_path: Path):
    url = str(tmp_path / "sae")
    code = f"""
import time
from components import storage
with storage.claimed({url!r}) as claim:
    claim.check(now=True)
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"

    def work() -> None:
        with storage.claimed(url) as claim:
            claim.check(now=True)

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(work)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        os.kill(process.pid, signal.SIGKILL)
        waiting.result()
    process.communicate()


def test_a_link_is_what_it_leads_to_and_deleting_it_leaves_that_alone(tmp_path: Path):
    (tmp_path / "disk" / "dataset").mkdir(parents=True)
    (tmp_path / "disk" / "dataset" / "manifest.json").write_text("{}")
    root = tmp_path / "root"
    root.mkdir()
    (root / "dataset").symlink_to(tmp_path / "disk" / "dataset")
    (root / "manifest.json").symlink_to(tmp_path / "disk" / "dataset" / "manifest.json")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    assert storage.list_folders(str(root)) == ["dataset"]
    assert storage.list_names(str(root)) == ["manifest.json"]
    storage.delete(str(root / "dataset"))
    assert storage.list_folders(str(root)) == []
    assert (tmp_path / "disk" / "dataset" / "manifest.json").exists()


@pytest.mark.parametrize("url", ["github://a:b@c/d", "http://127.0.0.1:9/x", "hf://a/b", "simplecache::http://a/b", "zip://a"])
def test_an_address_that_would_ask_another_network_is_refused(url: str):
    with pytest.raises(UserError, match=r"accepted is a path of this machine, file:// or s3://"):
        storage.exists(url)


def test_a_local_name_is_no_chain_of_file_systems(tmp_path: Path):
    storage.put_bytes(b"1", f"{tmp_path}/a::b#c?d")
    assert (tmp_path / "a::b#c?d").read_bytes() == b"1" == storage.read_bytes(f"file://{tmp_path}/a::b#c?d")


@pytest.mark.parametrize("url", ["/dev/null/x", "n" * 5_000, "/" + "n" * 300 + "/x"])
def test_a_path_that_cannot_be_is_one_where_nothing_is(url: str):
    assert not storage.exists(url)
    assert storage.list_names(url) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)
