"""`sweep.json`: what a sweep found, child by child."""

from __future__ import annotations

from typing import Any, Literal

from components import storage
from components.records import read_record
from components.settings import Record, UserError


class SweepPoint(Record):
    """One child: its setting, what it came to, what it cost."""

    values: dict[str, Any]
    """Of the fields that vary."""
    status: Literal["finished", "diverged", "failed", "pruned", "waiting"]
    reason: str | None = None
    """Why there is no loss."""
    sae_digest: str
    sae_url: str
    architecture: str
    hook_point: str
    d_in: int
    features: int
    k: int | None
    """Of an architecture that has it; else the features per token are those measured, `l0`."""
    steps: int
    batch_size: int
    tokens: int
    """Read in training: whole steps."""
    learning_rate: float
    flops_dense: int
    """Of the training, see `components.run.estimate`."""
    flops_sparse: int | None = None
    """The same with decoder and gradients over the active features alone (those measured)."""
    loss: float | None = None
    """Normalised MSE on held-out documents: `1 - explained_variance`."""
    explained_variance: float | None = None
    l0: float | None = None
    loss_recovered: float | None = None
    dead_fraction: float | None = None
    decoder_cosine: float | None = None
    """Mean absolute cosine between decoder rows, see `components.sweeps.sparsity`."""
    mlflow_run: str | None = None


class SweepRecord(Record):
    digest: str
    name: str
    grid: dict[str, list[Any]]
    """The values that each field has taken; of a study, those that were drawn."""
    study: dict[str, Any] | None = None
    """Settings of the study, where Optuna has drawn the children."""
    dataset_digest: str
    evaluation_tokens: int
    mlflow_run: str
    seconds: float
    """Of the processes that trained, from their start to their end; evaluation is not in it."""
    points: tuple[SweepPoint, ...]

    @property
    def finished(self) -> list[SweepPoint]:
        return [point for point in self.points if point.status == "finished"]


def record_url(url: str) -> str:
    return storage.join(url, "sweep.json")


def read_sweep(url: str) -> SweepRecord | None:
    """The record of the sweep in that folder, None where there is none."""
    return read_record(SweepRecord, record_url(url), "delete it, and the next sweep writes it anew")


def load_sweep(place: str) -> SweepRecord:
    """The record in a file, or in the folder that holds it; a UserError where there is none."""
    url = place if place.endswith(".json") else record_url(place)
    try:
        found = read_record(SweepRecord, url, "run the sweep again")
    except IsADirectoryError:
        found = None
    if found is None:
        raise UserError(f"--sweep: '{place}' is not there; give the sweep.json that `sae sweep` has written")
    return found
