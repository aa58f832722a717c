"""Checkpoints: safetensors files with all that the next step depends on, put whole or not at all, beside the training.

One process puts one file; of several that hold shares of the features each puts its own, and a checkpoint is complete when
all of them are there. It is read by any number of processes. Tensors are those of `CoderInTraining.tensors`; the step and the
training curves stand as JSON in the file's header. Data order, learning rate and the weights of the loss are functions of the
step, and no step draws random numbers, so there is nothing else to save.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from components import storage
from components.training.job import Point
from components.training.parallel.shares import Share, read_share
from components.training.step import CoderInTraining

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)(?:\.(\d+)-of-(\d+))?\.safetensors")


def checkpoint_folder(url: str) -> str:
    return storage.join(url, "checkpoints")


def restore_checkpoint(training: CoderInTraining, url: str) -> bool:
    """Bring `training` to the newest complete checkpoint under `url`; False, and nothing changed, where there is none."""
    complete = _complete(url)
    if not complete:
        return False
    names, share = complete[max(complete)], Share.of(training.coder.mesh)
    with ExitStack() as stack:
        paths = [stack.enter_context(storage.local_copy(storage.join(checkpoint_folder(url), name))) for name in names]
        with safe_open(paths[0], framework="pt") as file:
            header = json.loads(file.metadata()["state"])
        tensors = load_file(paths[0]) if len(paths) == share.count == 1 else read_share(paths, share)
        training.restore(tensors, header["step"], header["curves"])
    return True


def newest_checkpoint(url: str) -> int | None:
    """The step of the newest complete one."""
    return max(_complete(url), default=None)


def discard_incomplete(url: str) -> None:
    """Remove checkpoints that have not all of their files: they would be completed by another number of processes, whose
    rounding differs."""
    kept = {name for names in _complete(url).values() for name in names}
    for name in storage.list_names(checkpoint_folder(url)):
        if _NAME.fullmatch(name) and name not in kept:
            storage.delete(storage.join(checkpoint_folder(url), name))


def _name(step: int, share: Share) -> str:
    shared = "" if share.count == 1 else f".{share.number}-of-{share.count}"
    return f"step-{step:010d}{shared}.safetensors"


def _complete(url: str) -> dict[int, list[str]]:
    """The files of each complete checkpoint by its step, in the order of their shares."""
    there = set(storage.list_names(checkpoint_folder(url)))
    found = {}
    for match in filter(None, map(_NAME.fullmatch, there)):
        step, count = int(match[1]), int(match[3] or 1)
        names = [_name(step, Share(number, count)) for number in range(count)]
        if there.issuperset(names):
            found[step] = names
    return found


@dataclass(frozen=True)
class _Snapshot:
    tensors: dict[str, Tensor]
    step: int
    curves: list[Point]


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time; the trainer waits only for the copy of its tensors, and for a
    checkpoint before it that is not written yet.

    The newest `kept` complete ones stay. `still_owned` is asked before anything is put or removed, and raises where another
    process has taken the training over.
    """

    def __init__(self, url: str, still_owned: Callable[[], None], kept: int = 1) -> None:
        self._url, self._still_owned, self._kept = url, still_owned, kept
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.begun: int | None = None
        """Step of the newest checkpoint that this writer has begun."""
        self.complete: int | None = None
        """Step of the newest one that it has put."""

    def save(self, training: CoderInTraining) -> None:
        """Begin to write a checkpoint; raises what went wrong with the one before. Of processes with the same share of the
        features the first one writes."""
        self.wait()
        mesh, self.begun = training.coder.mesh, training.step
        if mesh is not None and mesh.data_rank > 0:
            self.complete = training.step
            return
        # A copy of its own: the next steps change these tensors in place.
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in training.tensors().items()}
        snapshot = _Snapshot(tensors, training.step, list(training.curves))
        # A daemon: a process that is to end does not wait for an upload.
        run = (snapshot, Share.of(mesh))
        self._thread = threading.Thread(target=self._run, args=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the checkpoint that was begun is complete, within `seconds`; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return True

    def _run(self, snapshot: _Snapshot, share: Share) -> None:
        try:
            self._write(snapshot, share)
        except BaseException as error:
            self._failure = error

    def _write(self, snapshot: _Snapshot, share: Share) -> None:
        folder = checkpoint_folder(self._url)
        header = {"state": json.dumps({"step": snapshot.step, "curves": snapshot.curves})}
        with storage.whole_file(storage.join(folder, _name(snapshot.step, share))) as path:
            save_file(snapshot.tensors, path, metadata=header)
            self._still_owned()
        self.complete = snapshot.step
        self._still_owned()
        complete = sorted(_complete(self._url))[-self._kept :]
        for name in storage.list_names(folder):
            match = _NAME.fullmatch(name)
            if match and complete and int(match[1]) < complete[0]:
                storage.delete(storage.join(folder, name))


class Due:
    """Whether the time between two checkpoints is over."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else minutes * 60
        self.begin()

    def begin(self) -> None:
        self._since = time.monotonic()

    def now(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds
