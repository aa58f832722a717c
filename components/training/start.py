"""Training that continues from a coder: its weights, as they are on scaled activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from components import storage
from components.interop.saelens import CONFIG_NAME, WEIGHTS_NAME, load_saelens, read_config
from components.sae.coder import Coder, per_dimension
from components.settings import UserError
from components.storage import file_sha256
from components.training.job import Start


def content_of(folder: Path, location: str) -> Start:
    """What lies in a folder of this machine, a copy of what is at `location`."""
    return Start(
        location=location,
        weights_sha256=file_sha256(folder / WEIGHTS_NAME),
        config_sha256=file_sha256(folder / CONFIG_NAME),
    )


def load_start(coder: Coder, start: Start, scale_in: Sequence[float], scale_out: Sequence[float]) -> None:
    """The weights of `start` into a coder that is trained on columns multiplied by these scales, so that it computes the same.

    A UserError where what is there is not what the run was resolved with.
    """
    with storage.local_copies(start.location, (CONFIG_NAME, WEIGHTS_NAME)) as folder:
        if content_of(folder, start.location) != start:
            raise UserError(
                f"training.start_from: the coder at '{start.location}' is not the one that the run began with, whose weights "
                f"have the SHA-256 {start.weights_sha256[:16]}; start the run again"
            )
        try:
            continued = as_trained(coder, folder, scale_in, scale_out)
        except ValueError as error:
            raise UserError(f"training.start_from: {error}") from error
    coder.load_state_dict(continued.state_dict())


def as_trained(coder: Coder, folder: Path, scale_in: Sequence[float], scale_out: Sequence[float]) -> Coder:
    """The coder in a local folder as one of the class and shape of `coder`, with unit decoder rows, for columns that are
    multiplied by these scales: `Coder.folded` the other way round. A ValueError where it is no such coder."""
    normalization = read_config(folder).get("normalize_activations")
    if normalization not in ("none", None):
        raise ValueError(f"its normalize_activations is '{normalization}'; accepted is 'none'")
    given = load_saelens(folder, torch.device("cpu"))
    if not isinstance(given, Coder):
        raise ValueError("its center_writing_weights is true; accepted is false")
    raw = type(coder)(coder.settings, coder.reads, coder.writes, coder.d_sae)
    raw.subtracts = False
    raw.unit = None if len(set(scale_out)) == 1 else per_dimension(raw.writes, scale_out) / scale_out[0]
    raw.load_exported(given.state_dict())
    return raw.folded([1 / scale for scale in scale_in], [1 / scale for scale in scale_out]).subtracting()
