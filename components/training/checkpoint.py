"""Checkpoints: one safetensors file with all that the next step depends on, put whole or not at all, beside the training.

Tensors are those of `CoderInTraining.tensors`; the step and the training curves stand as JSON in the file's header. Data order,
learning rate and the weights of the loss are functions of the step, and no step draws random numbers, so there is nothing else
to save.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from components import storage
from components.training.job import Point
from components.training.step import CoderInTraining

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)\.safetensors")


def checkpoint_folder(url: str) -> str:
    return storage.join(url, "checkpoints")


def restore_checkpoint(training: CoderInTraining, url: str) -> bool:
    """Bring `training` to the newest checkpoint under `url`; False, and nothing changed, where there is none."""
    steps = _steps(url)
    if not steps:
        return False
    with storage.local_copy(storage.join(checkpoint_folder(url), _name(steps[-1]))) as path:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["state"])
        training.restore(load_file(path), header["step"], header["curves"])
    return True


def _name(step: int) -> str:
    return f"step-{step:010d}.safetensors"


def _steps(url: str) -> list[int]:
    """Of the checkpoints that are there, oldest first."""
    found = (_NAME.fullmatch(name) for name in storage.list_names(checkpoint_folder(url)))
    return sorted(int(match[1]) for match in found if match)


@dataclass(frozen=True)
class _Snapshot:
    tensors: dict[str, Tensor]
    step: int
    curves: list[Point]


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time; the trainer waits only for the copy of its tensors, and for a
    checkpoint before it that is not written yet.

    A checkpoint is removed once a newer one is complete. `still_owned` is asked before anything is put or removed, and raises
    where another process has taken the training over.
    """

    def __init__(self, url: str, still_owned: Callable[[], None]) -> None:
        self._url, self._still_owned = url, still_owned
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.complete: int | None = None
        """Step of the newest checkpoint that this writer has put."""

    def save(self, training: CoderInTraining) -> None:
        """Begin to write a checkpoint; raises what went wrong with the one before."""
        self.wait()
        # A copy of its own: the next steps change these tensors in place.
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in training.tensors().items()}
        snapshot = _Snapshot(tensors, training.step, list(training.curves))
        # A daemon: a process that is to end does not wait for an upload.
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
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

    def _run(self, snapshot: _Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:
            self._failure = error

    def _write(self, snapshot: _Snapshot) -> None:
        folder = checkpoint_folder(self._url)
        header = {"state": json.dumps({"step": snapshot.step, "curves": snapshot.curves})}
        with storage.whole_file(storage.join(folder, _name(snapshot.step))) as path:
            save_file(snapshot.tensors, path, metadata=header)
            self._still_owned()
        self.complete = snapshot.step
        self._still_owned()
        for step in _steps(self._url):
            if step < snapshot.step:
                storage.delete(storage.join(folder, _name(step)))
