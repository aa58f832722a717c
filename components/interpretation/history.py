"""A feature through the versions before: every coder was compared with the champion of its time, that one with its own, and so
on back, as far as those coders lie under the same root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components import storage
from components.interpretation.explanations.table import Explanation, read_explanations
from components.interpretation.matches import TABLE, MatchesRecord, read_matches
from components.interpretation.record import interpretation_url
from components.training.job import read_training_record

MOST_VERSIONS = 10


@dataclass(frozen=True)
class Earlier:
    """A version with which the coder after it was compared."""

    version: str
    """Its number; `NUMBER of NAME` where its registered model is another than the first one's."""
    folder: str | None
    """Beside the other coders; None where it is elsewhere."""
    later: Mapping[str, np.ndarray]
    """Of the coder after it, features that fire, in their order: `feature`, `status`, `nearest` (-1 for none), `cosine`."""
    own: Mapping[str, np.ndarray]
    """Of its own features that fire, in their order: `feature`, `density`."""
    explanations: Mapping[int, Explanation]


def read_history(saes_url: str, sae_url: str, matches: MatchesRecord | None) -> tuple[Earlier, ...]:
    """Of the coder at `sae_url` under `saes_url`, the latest version first; at most `MOST_VERSIONS`. matches: its own. Memory:
    a row per feature and version."""
    found, been, name = list[Earlier](), {sae_url.rstrip("/").rpartition("/")[2]}, matches and matches.registered_model
    while matches is not None and len(found) < MOST_VERSIONS and matches.folder not in been:
        version = matches.version if matches.registered_model == name else f"{matches.version} of {matches.registered_model}"
        with storage.local_copies(interpretation_url(sae_url), (TABLE,)) as folder:
            columns = ["side", "feature", "status", "nearest", "cosine", "density"]
            table = pq.read_table(folder / TABLE, columns=columns)
        url = None if matches.folder is None else storage.join(saes_url, matches.folder)
        record = None if url is None else read_training_record(url)
        said = {} if url is None or record is None else read_explanations(url, record.weights_sha256)
        later = _side(table, "version", ("feature", "status", "nearest", "cosine"))
        found.append(Earlier(version, matches.folder, later, _side(table, "champion", ("feature", "density")), said))
        if url is None or record is None:
            break
        been.add(matches.folder or "")
        sae_url, matches = url, read_matches(url, record.weights_sha256)
    return tuple(found)


def history(feature: int, versions: Sequence[Earlier]) -> list[dict[str, Any]]:
    """A row per version, the latest first: the `feature` of it that this one comes from, with the `cosine` of the two, the
    `status` of the later one (persisted, split, new), and that feature's `density` and `explanation`. The last row may be that
    of a version that has none like it: `new`, feature None."""
    rows = list[dict[str, Any]]()
    for one in versions:
        place = _place(one.later["feature"], feature)
        if place is None:  # it does not fire
            break
        status, nearest = str(one.later["status"][place]), int(one.later["nearest"][place])
        row: dict[str, Any] = {"version": one.version, "status": status}
        if status == "new" or nearest < 0:
            return [*rows, {**row, "feature": None, "cosine": None, "density": None, "explanation": ""}]
        own, said = _place(one.own["feature"], nearest), one.explanations.get(nearest)
        rows.append(
            {
                **row,
                "feature": nearest,
                "cosine": float(one.later["cosine"][place]),
                "density": None if own is None else float(one.own["density"][own]),
                "explanation": "" if said is None else said.explanation,
            }
        )
        feature = nearest
    return rows


def _side(table: pa.Table, side: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    rows = table.filter(pc.equal(table["side"], side)).sort_by("feature")
    arrays = {name: rows[name] for name in names}
    if "nearest" in arrays:
        arrays |= {"nearest": pc.fill_null(rows["nearest"], -1), "cosine": pc.fill_null(rows["cosine"], 0.0)}
    found = {name: column.to_numpy() for name, column in arrays.items()}
    return {name: column.astype(np.str_) if name == "status" else column for name, column in found.items()}


def _place(numbers: np.ndarray, number: int) -> int | None:
    place = int(np.searchsorted(numbers, number))
    return place if place < len(numbers) and numbers[place] == number else None
