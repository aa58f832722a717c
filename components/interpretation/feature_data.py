"""Feature data: Parquet tables beside the coder, made by one pass over held-out text.

`interpretation/` holds `examples.parquet` (a row per example, in the order of features, a row group for every
`FEATURES_PER_GROUP` features), `features.parquet` (a row per feature), of an image corpus `pictures.parquet` (see `pictures`)
and, put last, `interpretation.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from components import storage
from components.evaluation.held_out import HeldOut, right_padded
from components.interpretation.examples import Found, bin_edges
from components.interpretation.logits import logit_effects
from components.interpretation.pictures import write_pictures
from components.interpretation.record import InterpretationRecord
from components.interpretation.seen import Seen
from components.interpretation.settings import InterpretationSettings
from components.interpretation.token_shares import token_shares
from components.language_model.hook_points import HookPoint
from components.records import put_record

FEATURES_PER_GROUP = 32
TOKENS_SHOWN, TOGETHER = 10, 10
"""Tokens of the vocabulary, and features that fire with another, that are listed of each, at most."""
_SEQUENCES_AT_ONCE, _ROWS_AT_ONCE = 256, 1 << 14
_KINDS = ("strongest", "sample")


def write_feature_data(
    url: str,
    record: InterpretationRecord,
    seen: Seen,
    settings: InterpretationSettings,
    text: HeldOut,
    effects: tuple[Tensor, Tensor] | None,
    places: np.ndarray | None,
) -> None:
    """Put both tables and then the record under `url`. places: see `layout`."""
    found, d_sae = seen.examples.found(), len(seen.examples.firing)
    rows = _rows(found, settings.quantiles)
    _write_examples(storage.join(url, "examples.parquet"), found, rows, d_sae, text, record)
    if text.images is not None:
        write_pictures(url, text, record.requested, np.unique(rows.sequences))
    histogram = seen.examples.histogram.cpu().numpy()
    edges, counts = _histograms(histogram)
    columns: dict[str, Any] = {
        "feature": np.arange(d_sae, dtype=np.int32), "sequences": seen.examples.firing.cpu().numpy(),
        "fired": histogram.sum(axis=1), "histogram_edges": edges, "histogram": counts,
    }  # fmt: skip
    if text.images is None or text.images.layout.of_text:  # patches are no tokens
        shares = token_shares(found, TOKENS_SHOWN)
        ends = np.searchsorted(shares.features, np.arange(d_sae + 1))
        listed = {"token_ids": shares.ids.astype(np.int32), "token_shares": shares.shares}
        for name, values in {**listed, "token_means": shares.means, "token_largest": shares.largest}.items():
            columns[name] = _lists(ends, values)
    others, own, overlaps = seen.together.nearest(TOGETHER)
    ends = np.concatenate([[0], (others >= 0).sum(axis=1).cumsum()])
    for name, values in {"together": others, "together_shares": own, "together_overlaps": overlaps}.items():
        columns[name] = _lists(ends, values[others >= 0])
    if places is not None:
        columns |= {"map_x": places[:, 0], "map_y": places[:, 1]}
    if effects is not None:
        ids, values = (part.cpu().numpy() for part in effects)
        columns |= {"logit_tokens": list(ids.astype(np.int32)), "logit_effects": list(values.astype(np.float32))}
    with storage.whole_file(storage.join(url, "features.parquet")) as path:
        pq.write_table(pa.table(columns), path, compression="zstd")
    put_record(record, storage.join(url, "interpretation.json"))


_EXAMPLES = pa.schema(
    {
        "feature": pa.int32(),
        "kind": pa.string(),  # strongest, sample
        "rank": pa.int32(),
        "quantile": pa.int32(),  # of a sample: 0 is the group of the smallest activations; else -1
        "activation": pa.float32(),  # of a sequence that is among the strongest, the largest; of a sample, that of its token
        "place": pa.int32(),  # where that is
        "document": pa.int64(),
        "position": pa.int32(),  # of that token in its document
        "tokens": pa.list_(pa.int32()),  # the whole sequence
        "activations": pa.list_(pa.float32()),
    }
)


@dataclass
class _Rows:
    """Of the table of examples, in its order; all arrays `[n]`."""

    features: np.ndarray
    kinds: np.ndarray
    ranks: np.ndarray
    quantiles: np.ndarray
    sequences: np.ndarray
    places: np.ndarray
    activations: np.ndarray


def _write_examples(url: str, found: Found, rows: _Rows, d_sae: int, text: HeldOut, record: InterpretationRecord) -> None:
    tokens, documents, positions = _texts(text, record, rows)
    length = found.length
    with storage.whole_file(url) as path, pq.ParquetWriter(path, _EXAMPLES, compression="zstd") as writer:
        for first in range(0, d_sae, FEATURES_PER_GROUP):
            start, stop = np.searchsorted(rows.features, [first, first + FEATURES_PER_GROUP])
            part, offsets = slice(start, stop), np.arange(0, (stop - start + 1) * length, length, dtype=np.int32)
            along = found.along(rows.features[part], rows.sequences[part])
            columns = [
                rows.features[part].astype(np.int32), np.array(_KINDS, dtype=object)[rows.kinds[part]],
                rows.ranks[part].astype(np.int32), rows.quantiles[part].astype(np.int32), rows.activations[part],
                rows.places[part].astype(np.int32), documents[part], positions[part].astype(np.int32),
                pa.ListArray.from_arrays(offsets, tokens[rows.sequences[part]].reshape(-1)),
                pa.ListArray.from_arrays(offsets, along.reshape(-1)),
            ]  # fmt: skip
            arrays = [pa.array(column, type=field.type) for column, field in zip(columns, _EXAMPLES, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=_EXAMPLES), row_group_size=max(1, stop - start))


def _rows(found: Found, quantiles: int) -> _Rows:
    peaks, largest = np.zeros(len(found.features), np.int64), np.zeros(len(found.features), np.float32)
    for first in range(0, len(peaks), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        along = found.along(found.features[part], found.sequences[part])
        peaks[part], largest[part] = along.argmax(axis=1), along.max(axis=1)
    places, activations = np.concatenate([peaks, found.drawn_places]), np.concatenate([largest, found.drawn_values])
    features, kinds = np.concatenate([found.features, found.drawn]), np.repeat([0, 1], [len(peaks), len(found.drawn)])
    sequences = np.concatenate([found.sequences, found.drawn_sequences])
    # The strongest are in order; of a sample those of equal activation stay as they were drawn.
    order = np.lexsort((np.where(kinds == 1, -activations, 0), kinds, features))
    features, kinds = features[order], kinds[order]
    starts = np.flatnonzero(np.diff(2 * features + kinds, prepend=-1))
    sizes = np.diff(starts, append=len(order))
    ranks, size = np.arange(len(order)) - np.repeat(starts, sizes), np.repeat(sizes, sizes)
    groups = np.where(kinds == 1, quantiles - 1 - ranks * quantiles // np.maximum(size, 1), -1)
    return _Rows(features, kinds, ranks, groups, sequences[order], places[order], activations[order])


def _texts(text: HeldOut, record: InterpretationRecord, rows: _Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sequences that were looked at, int32 `[sequences, length]`; of each row's token the document and the position in
    it."""
    tokens, documents, positions = [], np.zeros(len(rows.features), np.int64), np.zeros(len(rows.features), np.int64)
    order, first = rows.sequences.argsort(kind="stable"), 0
    sorted_ = rows.sequences[order]
    for block in text.batches(record.requested, _SEQUENCES_AT_ONCE):
        block = right_padded(block)
        own = order[slice(*np.searchsorted(sorted_, [first, first + len(block)]))]
        where = rows.sequences[own] - first, rows.places[own]
        documents[own], positions[own] = block.documents[where], block.positions[where]
        tokens.append(block.tokens.astype(np.int32))
        first += len(block)
    return np.concatenate(tokens), documents, positions


def _lists(ends: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(ends.astype(np.int32), pa.array(values))


def _histograms(counted: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """counted `[d_sae, BINS]` -> of each feature the edges and counts of the bins from the first to the last that holds one."""
    edges, counts, every = [], [], bin_edges()
    for row in counted:
        filled = np.flatnonzero(row)
        first, stop = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)
        counts.append(row[first:stop])
        edges.append(every[first : stop + 1] if len(filled) else every[:0])
    return edges, counts


def effects_of(model: nn.Module, point: HookPoint, sae: Any, count: int) -> tuple[Tensor, Tensor] | None:
    """`logit_effects` of a coder's decoder rows, where it has some."""
    rows = getattr(sae, "W_dec", None)
    return None if rows is None or count == 0 else logit_effects(model, point, rows, count)
