"""Explanations beside the feature data: `explanations.parquet`, a row per explained feature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from components import storage
from components.interpretation.record import interpretation_url
from components.settings import Record

TABLE = "explanations.parquet"
_WEIGHTS = b"weights_sha256"
INTERPRETABLE = 0.7
"""Detection's balanced accuracy from which on an explanation counts as one that fits; 0.5 is chance."""


class Explanation(Record):
    feature: int
    explanation: str
    detection: float | None
    """Balanced accuracy; None where it was not measured."""
    fuzzing: float | None
    explainer: str
    intruder: float | None = None
    """Share of the texts that do not belong that were found, without the explanation; 0.2 is chance."""
    specificity: float | None = None
    """Mean grade from 0 to 3 of how the explanation fits what fires."""
    carried_from: str | None = None
    """The version whose feature was explained; None for this coder's own."""
    carried_feature: int | None = None
    carried_cosine: float | None = None


_SCHEMA = pa.schema(
    {
        "feature": pa.int32(), "explanation": pa.string(), "detection": pa.float64(), "fuzzing": pa.float64(),
        "intruder": pa.float64(), "specificity": pa.float64(), "explainer": pa.string(),
        "carried_from": pa.string(), "carried_feature": pa.int32(), "carried_cosine": pa.float64(),
    }
)  # fmt: skip


def write_explanations(sae_url: str, weights_sha256: str, explanations: Iterable[Explanation]) -> None:
    rows = [one.model_dump() for one in sorted(explanations, key=lambda one: one.feature)]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA).replace_schema_metadata({_WEIGHTS: weights_sha256.encode()})
    with storage.whole_file(storage.join(interpretation_url(sae_url), TABLE)) as path:
        pq.write_table(table, path, compression="zstd")


def read_explanations(sae_url: str, weights_sha256: str) -> dict[int, Explanation]:
    """By feature; none where they are of other weights."""
    url = interpretation_url(sae_url)
    if not storage.exists(storage.join(url, TABLE)):
        return {}
    with storage.local_copies(url, (TABLE,)) as folder:
        table = pq.read_table(folder / TABLE)
    if (table.schema.metadata or {}).get(_WEIGHTS) != weights_sha256.encode():
        return {}
    return {row["feature"]: Explanation(**row) for row in table.to_pylist()}


def interpretable_share(explanations: Iterable[Explanation]) -> dict[str, float]:
    """`interpretable_share`: of the features whose own explanation was scored by detection, those that reach `INTERPRETABLE`;
    and `scored_explanations`, how many there are. Empty for none: what was carried over says nothing of this coder."""
    scores = [one.detection for one in explanations if one.carried_from is None and one.detection is not None]
    if not scores:
        return {}
    fitting = sum(score >= INTERPRETABLE for score in scores)
    return {"interpretable_share": fitting / len(scores), "scored_explanations": float(len(scores))}


def carried(
    own: Mapping[int, Explanation],
    earlier: Mapping[int, Explanation],
    matches: Mapping[int, Mapping[str, object]],
    version: str,
) -> dict[int, Explanation]:
    """`own`, and for persisted features without one what was said of theirs, marked as such. matches: `matched_features`."""
    found = dict(own)
    for feature, match in matches.items():
        before = match["nearest"]
        if match["status"] == "persisted" and feature not in own and isinstance(before, int) and before in earlier:
            marks = {"feature": feature, "carried_from": version, "carried_feature": before, "carried_cosine": match["cosine"]}
            found[feature] = earlier[before].model_copy(update=marks)
    return found
