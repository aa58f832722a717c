"""The feature JSON of Anthropic's visualisations, packed as circuit-tracer reads it.

`features/index.json.gz` is a list with an entry per layer, `{filename, offsets}`; from `offsets[f]` to `offsets[f + 1]` of that
file lies feature `f`: its length as a little-endian int32, then zlib's deflate of its JSON.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WINDOW = 48


def write(folder: Path, features: Iterable[dict[str, Any]], layer: int, name: str) -> int:
    """features: all of them in their order, as `FeatureData.feature` gives them, with `WINDOW`. Their number."""
    target = folder / "features"
    target.mkdir(parents=True)
    file, offsets = f"layer_{layer}.bin", [0]
    with (target / file).open("wb") as out:
        for feature in features:
            packed = zlib.compress(json.dumps(record(feature, name), allow_nan=False).encode())
            out.write(struct.pack("<i", len(packed)) + packed)
            offsets.append(out.tell())
    layers: list[dict[str, Any]] = [{"filename": "", "offsets": []} for _ in range(layer)]
    index = json.dumps([*layers, {"filename": file, "offsets": offsets}]).encode()
    (target / "index.json.gz").write_bytes(gzip.compress(index, mtime=0))
    return len(offsets) - 1


def record(feature: dict[str, Any], name: str) -> dict[str, Any]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for example in feature["examples"]:
        groups.setdefault(example["quantile"], []).append(example)
    sampled = sorted((quantile for quantile in groups if quantile >= 0), reverse=True)
    named = [("Top activations", groups.get(-1, []))]
    named += [(f"Subsample interval {place}", groups[quantile]) for place, quantile in enumerate(sampled)]
    said = feature["explained"]
    return {
        "transcoder_id": name,
        "index": feature["row"]["feature"],
        "examples_quantiles": [
            {"quantile_name": title, "examples": [_example(example) for example in some]} for title, some in named if some
        ],
        "top_logits": [token for token, _ in feature["likely"]],
        "bottom_logits": [token for token, _ in feature["unlikely"]],
        "act_min": 0.0,  # where the colours begin
        "act_max": feature["row"]["max"],
        "quantile_values": [min(one["activation"] for one in groups[quantile]) for quantile in reversed(sampled)],
        "histogram": [float(count) for count in feature["histogram"]["counts"]],
        "activation_frequency": feature["row"]["density"],
        **({} if said is None else {"clerp": said["explanation"]}),
    }


def _example(example: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens_acts_list": example["activations"],
        "train_token_ind": example["peak"],
        "is_repeated_datapoint": False,
        "tokens": example["tokens"],
    }
