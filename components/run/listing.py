"""The SAEs under a root, whatever became of them."""

from __future__ import annotations

from pydantic import Field

from components import storage
from components.evaluation.record import EvaluationRecord, record_url
from components.records import read_record
from components.settings import Record, UserError
from components.training.checkpoint import checkpoint_folder
from components.training.job import read_training_record

SHOWN = ("l0", "explained_variance", "loss_recovered")


class ListedSAE(Record):
    name: str
    """Of its folder: the run's name and the digest."""
    url: str
    state: str
    """`evaluated`, `trained`, `training` (it has a checkpoint), `begun` or `damaged`."""
    problem: str | None = None
    """Why it cannot be read."""
    architecture: str | None = None
    d_sae: int | None = None
    tokens: int | None = None
    """That it was trained on."""
    hook_point: str | None = None
    metrics: dict[str, float | int | None] = Field(default_factory=dict)
    """SHOWN, once it is evaluated."""


def list_saes(root: str) -> list[ListedSAE]:
    """In the order of their names."""
    folder = storage.join(root, "saes")
    return [_listed(name, storage.join(folder, name)) for name in storage.list_folders(folder)]


def _listed(name: str, url: str) -> ListedSAE:
    try:
        trained = read_training_record(url)
        if trained is None:
            begun = bool(storage.list_names(checkpoint_folder(url)))
            return ListedSAE(name=name, url=url, state="training" if begun else "begun")
        measured = read_record(EvaluationRecord, record_url(url), "delete it to measure anew")
    except UserError as error:
        return ListedSAE(name=name, url=url, state="damaged", problem=str(error))
    return ListedSAE(
        name=name,
        url=url,
        state="trained" if measured is None else "evaluated",
        architecture=trained.architecture,
        d_sae=trained.d_sae,
        tokens=trained.tokens,
        hook_point=None if measured is None else measured.about.hook_point,
        metrics={} if measured is None else {key: measured.metrics.get(key) for key in SHOWN},
    )
