"""A file is whole or absent, and a commit has one winner."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components import storage
from components.settings import UserError


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
