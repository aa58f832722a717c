"""Which features the champion of the time had, too: `matches.parquet` and `matches.json` beside the feature data."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components import storage
from components.interpretation.record import interpretation_url
from components.records import put_record, read_record
from components.settings import Record

TABLE = "matches.parquet"
_RECORD = "matches.json"
MOST_GONE = 1_000


class MatchesRecord(Record):
    """Of a comparison with a version (`evaluation.stability.compare`)."""

    weights_sha256: str
    """Of the coder whose features these are."""
    registered_model: str
    version: str
    sae_digest: str | None
    """The version's, None of one that was imported."""
    folder: str | None = None
    """The version's, beside this coder's; None where it is elsewhere."""
    counts: dict[str, Any]
    """Features that are persisted, split, new, merged, vanished; shares of them."""


def write_matches(sae_url: str, record: MatchesRecord, table: pa.Table) -> None:
    url = interpretation_url(sae_url)
    with storage.whole_file(storage.join(url, TABLE)) as path:
        pq.write_table(table, path, compression="zstd")
    put_record(record, storage.join(url, _RECORD))


def read_matches(sae_url: str, weights_sha256: str) -> MatchesRecord | None:
    """None where there was no champion to compare with, or the weights are other ones."""
    record = read_record(MatchesRecord, storage.join(interpretation_url(sae_url), _RECORD), "delete it to make it anew")
    return record if record is not None and record.weights_sha256 == weights_sha256 else None


def matched_features(sae_url: str) -> dict[int, dict[str, Any]]:
    """Of each feature that fires its `status` (persisted, split, new), and `nearest` of the version with its `cosine`."""
    with storage.local_copies(interpretation_url(sae_url), (TABLE,)) as folder:
        table = pq.read_table(folder / TABLE, columns=["side", "feature", "status", "nearest", "cosine"])
    rows = table.filter(pc.equal(table["side"], "version")).to_pylist()
    return {row["feature"]: {name: row[name] for name in ("status", "nearest", "cosine")} for row in rows}


def gone_features(sae_url: str) -> list[dict[str, Any]]:
    """Features of the version that are not here any more, `vanished` or `merged` (with `nearest` here and its `cosine`), those
    that added most to its reconstruction first: at most `MOST_GONE`."""
    with storage.local_copies(interpretation_url(sae_url), (TABLE,)) as folder:
        table = pq.read_table(folder / TABLE, columns=["side", "feature", "status", "nearest", "cosine", "density", "weight"])
    wanted = pc.and_(pc.equal(table["side"], "champion"), pc.is_in(table["status"], pa.array(["vanished", "merged"])))
    rows = table.filter(wanted).sort_by([("weight", "descending"), ("feature", "ascending")]).slice(0, MOST_GONE)
    return rows.drop_columns(["side", "weight"]).to_pylist()
