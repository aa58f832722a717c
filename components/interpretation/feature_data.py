"""Feature data: Parquet tables beside the coder, made by one pass over held-out text.

`interpretation/` holds `examples.parquet` (a row per example, in the order of features), `features.parquet` (a row per feature)
and, put last, `interpretation.json`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from components import storage
from components.evaluation.held_out import HeldOut
from components.interpretation.activations import ByNumber, Pass
from components.interpretation.examples import Examples, Kept, Tokens, bin_edges
from components.interpretation.logits import logit_effects
from components.interpretation.record import InterpretationRecord
from components.interpretation.settings import InterpretationSettings
from components.language_model.hook_points import HookPoint
from components.records import put_record

_FEATURES_PER_GROUP = 64


def find_examples(settings: InterpretationSettings, held_out: Pass) -> tuple[Examples, int, int]:
    """Examples of every feature, tokens and sequences that were looked at."""
    length = held_out.text.manifest.context_length
    examples = Examples(settings.examples, settings.drawn, held_out.d_sae, length, held_out.device)
    tokens = sequences = 0
    for batch in held_out.batches():
        examples.add(batch.activations, batch.numbers, batch.documents, batch.positions)
        sequences, tokens = sequences + len(batch.numbers), tokens + batch.counted
    return examples, tokens, sequences


def write_feature_data(
    url: str,
    record: InterpretationRecord,
    examples: Examples,
    quantiles: int,
    text: HeldOut,
    effects: tuple[Tensor, Tensor] | None,
    places: np.ndarray | None,
) -> None:
    """Put both tables and then the record under `url`. places: see `layout`."""
    sequences = ByNumber(text, record.requested)
    d_sae, drawn = examples.firing.numel(), examples.drawn.found()
    starts = torch.searchsorted(drawn.features, torch.arange(d_sae + 1, device=drawn.features.device)).tolist()
    with (
        storage.whole_file(storage.join(url, "examples.parquet")) as path,
        pq.ParquetWriter(path, _EXAMPLES, compression="zstd") as writer,
    ):
        for start in range(0, d_sae, _FEATURES_PER_GROUP):
            block = range(start, min(start + _FEATURES_PER_GROUP, d_sae))
            rows = [row for feature in block for row in _rows(feature, examples.strongest, drawn, starts, quantiles, sequences)]
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=_EXAMPLES))
    histogram = examples.histogram.cpu().numpy()
    edges, counts = _histograms(histogram)
    columns: dict[str, Any] = {
        "feature": np.arange(d_sae, dtype=np.int32), "sequences": examples.firing.cpu().numpy(),
        "fired": histogram.sum(axis=1), "histogram_edges": edges, "histogram": counts,
    }  # fmt: skip
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


def _histograms(counted: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """counted `[d_sae, BINS]` -> of each feature the edges and counts of the bins from the first to the last that holds one."""
    edges, counts, every = [], [], bin_edges()
    for row in counted:
        filled = np.flatnonzero(row)
        first, stop = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)
        counts.append(row[first:stop])
        edges.append(every[first : stop + 1] if len(filled) else every[:0])
    return edges, counts


def _rows(
    feature: int, kept: Kept, drawn: Tokens, starts: list[int], quantiles: int, sequences: ByNumber
) -> list[dict[str, Any]]:
    found = []

    def add(kind: str, rank: int, quantile: int, sequence: int, place: int, activations: np.ndarray) -> None:
        tokens, documents, positions = sequences.of(sequence)
        found.append(
            {
                "feature": feature, "kind": kind, "rank": rank, "quantile": quantile, "activation": float(activations[place]),
                "place": place, "document": int(documents[place]), "position": int(positions[place]), "tokens": tokens,
                "activations": activations,
            }
        )  # fmt: skip

    for rank in range(int((kept.scores[:, feature] > 0).sum())):
        activations = kept.activations[rank, feature].cpu().numpy()
        add("strongest", rank, -1, int(kept.sequences[rank, feature]), int(activations.argmax()), activations)
    chosen = slice(starts[feature], starts[feature + 1])
    places = drawn.places[chosen].cpu().numpy()
    along = drawn.activations[chosen].cpu().numpy()
    numbers = drawn.sequences[chosen].tolist()
    order = np.argsort(-along[np.arange(len(places)), places], kind="stable")
    for rank, at in enumerate(order):
        quantile = quantiles - 1 - rank * quantiles // len(order)
        add("sample", rank, quantile, numbers[at], int(places[at]), along[at])
    return found


def effects_of(model: nn.Module, point: HookPoint, sae: Any, count: int) -> tuple[Tensor, Tensor] | None:
    """`logit_effects` of a coder's decoder rows, where it has some."""
    rows = getattr(sae, "W_dec", None)
    return None if rows is None or count == 0 else logit_effects(model, point, rows, count)
