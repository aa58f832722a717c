"""Neuronpedia's upload: `batch-00000.json` and so on, each the body of one `POST /api/feature/upload-batch`.

Within the limits of that route: 128 features a batch, 20 logits a side, 1,024 tokens an example, 512 characters an explanation,
and an example at least, so that features that never fired are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WINDOW = 64
"""Tokens of an example on each side of the one that it is about."""
FEATURES, LOGITS, CHARACTERS = 128, 20, 512


def write(folder: Path, features: Iterable[dict[str, Any]], model_id: str, source: str) -> int:
    """features: as `FeatureData.feature` gives them, with `WINDOW`. The number of features that were written."""
    batch: list[dict[str, Any]] = []
    written = 0
    for feature in features:
        if feature["examples"]:
            batch.append(_feature(feature))
        if len(batch) == FEATURES:
            written += _put(folder, written, batch, model_id, source)
            batch = []
    return written + (_put(folder, written, batch, model_id, source) if batch else 0)


def identifier(text: str) -> str:
    """As Neuronpedia's: lower case, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-")


def _put(folder: Path, before: int, batch: list[dict[str, Any]], model_id: str, source: str) -> int:
    body = {"modelId": model_id, "source": source, "features": batch}
    (folder / f"batch-{before // FEATURES:05d}.json").write_text(json.dumps(body, allow_nan=False), encoding="utf-8")
    return len(batch)


def _feature(feature: dict[str, Any]) -> dict[str, Any]:
    said = feature["explained"]
    groups: dict[int, list[float]] = {}
    for example in feature["examples"]:
        groups.setdefault(example["quantile"], []).append(example["activation"])
    of_sample = {quantile: values for quantile, values in groups.items() if quantile >= 0}
    return {
        "index": feature["row"]["feature"],
        "density": feature["row"]["density"],
        "topLogits": [{"token": token, "value": value} for token, value in feature["likely"][:LOGITS]],
        "bottomLogits": [{"token": token, "value": value} for token, value in feature["unlikely"][:LOGITS]],
        "explanations": []
        if said is None
        else [
            {
                "text": said["explanation"][:CHARACTERS],
                "methodName": "sae-foundry",
                "modelName": said["explainer"].partition(" at ")[0],
            }
        ],
        "activations": [_example(example, of_sample) for example in feature["examples"]],
    }


def _example(example: dict[str, Any], groups: dict[int, list[float]]) -> dict[str, Any]:
    found = {"tokens": example["tokens"], "values": example["activations"]}
    if (values := groups.get(example["quantile"])) is not None:
        found |= {"quantileMin": min(values), "quantileMax": max(values), "quantileFraction": 1 / len(groups)}
    return found
