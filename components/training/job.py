"""What there is to do for one coder's training, and the record that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components import storage
from components.records import read_record
from components.sae.choice import SAESettings
from components.settings import Record
from components.storage.cache import CachePlace
from components.training.settings import TrainingSettings

Point = dict[str, float]
"""One point of the training curves: `tokens` and the values at it."""


class Pruned(Exception):
    """A training that was given up because others promise more; it says after how many tokens."""


class Start(Record):
    """The coder that a training continues from."""

    location: str
    """A folder in SAELens' format, or `models:/NAME/VERSION`."""
    weights_sha256: str
    config_sha256: str

    @property
    def identity(self) -> dict[str, str]:
        """What it computes, wherever it is: configuration and weights."""
        return {"weights": self.weights_sha256, "config": self.config_sha256}


@dataclass(frozen=True, kw_only=True)
class Training:
    """One coder's training: where the data is, where the artifact goes, and how."""

    url: str
    digest: str
    identity: dict[str, Any]
    """All that decides the weights; `digest` is its digest."""
    settings: TrainingSettings
    coder: SAESettings
    dataset_url: str
    online: bool = False
    """Whether that is the folder of generations that are made meanwhile."""
    reads: tuple[str, ...]
    """Columns of the dataset."""
    writes: tuple[str, ...]
    seed: int
    metadata: dict[str, Any]
    """What SAELens shows beside the coder."""
    start: Start | None = None
    """In a folder; None for new weights."""
    cache: CachePlace | None = None
    """Where what is read from an object store is kept."""

    @property
    def steps(self) -> int:
        return self.settings.steps


class TrainingRecord(Record):
    """`training.json`, put last: its presence says that the artifact is whole."""

    digest: str
    identity: dict[str, Any]
    architecture: str
    d_in: int
    d_out: int
    d_sae: int
    activation_scale: float
    """Of the first column that is read: what its activations were multiplied by."""
    weights_sha256: str
    steps: int
    tokens: int
    device: str
    tokens_per_second: float | None
    """Of the process that ended it; None where it had nothing left to do."""
    waiting_for_data: float | None = None
    """Share of that process's time."""
    curves: list[Point]


Outcome = TrainingRecord | FloatingPointError | Pruned
"""What a training among several came to: its record, or why it has none."""


def record_url(url: str) -> str:
    return storage.join(url, "training.json")


def read_training_record(url: str) -> TrainingRecord | None:
    """The record of a finished training, None where there is none."""
    return read_record(TrainingRecord, record_url(url), f"delete {url} to train it anew")
