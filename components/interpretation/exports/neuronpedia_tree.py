"""Neuronpedia's tree for its bulk import: `<model>/<source>/` with `release`, `model`, `sourceset` and `source.jsonl`, and
`features/`, `activations/`, `explanations/batch-N.jsonl.gz`, a JSON object a line.

What the database asks for and no line of ours knows (who made it, when) is a name and a date that are given. Ids are made from
what they name: the same feature data gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.interpretation.exports.neuronpedia import CHARACTERS, FEATURES, LOGITS

_TOKENS, _LARGEST_INDEX = 1_024, 10_000_000
_HOOKS = {
    "resid_pre": "hook_resid_pre", "resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out",
}  # fmt: skip
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Release:
    """What the feature lines belong to."""

    model_id: str
    set_name: str
    layer: int
    layers: int
    kind: str
    """Of the hook point."""
    model_name: str
    dataset: str
    sequences: int
    context_length: int
    creator: str
    created: str
    """ISO 8601."""

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set_name}"


def write(folder: Path, features: Iterable[dict[str, Any]], release: Release) -> int:
    """features: as `FeatureData.feature` gives them. The number of features that were written: all, those that never fired
    without activations."""
    target = folder / release.model_id / release.source
    _put_heads(target, release)
    batch: list[dict[str, Any]] = []
    written = 0
    for feature in features:
        batch.append(feature)
        if len(batch) == FEATURES:
            written += _put_batch(target, written // FEATURES, batch, release)
            batch = []
    return written + (_put_batch(target, written // FEATURES, batch, release) if batch else 0)


def _put_heads(target: Path, release: Release) -> None:
    made = {"creatorId": release.creator, "createdAt": release.created}
    named = {"modelId": release.model_id, "name": release.set_name, "creatorName": release.creator}
    heads: dict[str, dict[str, Any]] = {
        "release": {
            "name": release.set_name, "description": f"SAE features of {release.model_name}",
            "descriptionShort": release.set_name, "urls": [],
            "creatorName": release.creator, "creatorNameShort": release.creator, **made,
        },
        "model": {
            "id": release.model_id, "instruct": False, "displayName": release.model_name,
            "displayNameShort": release.model_name, "layers": release.layers, "neuronsPerLayer": 0,
            "updatedAt": release.created, **made,
        },
        "sourceset": {
            **named, **made, "releaseName": release.set_name, "description": release.set_name, "visibility": "UNLISTED",
            "hasDashboards": True,
        },
        "source": {
            "id": release.source, "modelId": release.model_id, "setName": release.set_name, "dataset": release.dataset,
            "num_prompts": release.sequences, "num_tokens_in_prompt": release.context_length, "visibility": "UNLISTED", **made,
        },
    }  # fmt: skip
    target.mkdir(parents=True)
    for name, line in heads.items():
        (target / f"{name}.jsonl").write_text(json.dumps(line, allow_nan=False) + "\n", encoding="utf-8")


def _put_batch(target: Path, number: int, batch: list[dict[str, Any]], release: Release) -> int:
    lines = {
        "features": [_feature(feature, release) for feature in batch],
        "activations": [line for feature in batch for line in _activations(feature, release)],
        "explanations": [_explanation(feature, release) for feature in batch if feature["explained"] is not None],
    }
    for kind, found in lines.items():
        (target / kind).mkdir(exist_ok=True)
        with io.BytesIO() as stream:
            with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as packed:
                packed.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in found).encode())
            (target / kind / f"batch-{number}.jsonl.gz").write_bytes(stream.getvalue())
    return len(batch)


def _named(feature: Mapping[str, Any], release: Release) -> dict[str, Any]:
    index = feature["row"]["feature"]
    assert 0 <= index <= _LARGEST_INDEX
    return {"modelId": release.model_id, "layer": release.source, "index": str(index), "createdAt": release.created}


def _feature(feature: Mapping[str, Any], release: Release) -> dict[str, Any]:
    row, histogram, likely, unlikely = feature["row"], feature["histogram"], feature["likely"], feature["unlikely"]
    middles = [(low + high) / 2 for low, high in zip(histogram["edges"], histogram["edges"][1:], strict=False)]
    return {
        **_named(feature, release), "creatorId": release.creator, "maxActApprox": row["max"], "hasVector": False, "vector": [],
        "vectorLabel": None, "vectorDefaultSteerStrength": None, "hookName": hook_name(release.kind, release.layer),
        "topkCosSimIndices": [other for other, _ in feature["neighbours"]],
        "topkCosSimValues": [cosine for _, cosine in feature["neighbours"]],
        "neuron_alignment_indices": [], "neuron_alignment_values": [], "neuron_alignment_l1": [],
        "correlated_neurons_indices": [], "correlated_neurons_pearson": [], "correlated_neurons_l1": [],
        "correlated_features_indices": [], "correlated_features_pearson": [], "correlated_features_l1": [],
        "neg_str": [token for token, _ in unlikely[:LOGITS]], "neg_values": [value for _, value in unlikely[:LOGITS]],
        "pos_str": [token for token, _ in likely[:LOGITS]], "pos_values": [value for _, value in likely[:LOGITS]],
        "frac_nonzero": row["density"], "freq_hist_data_bar_heights": histogram["counts"], "freq_hist_data_bar_values": middles,
        "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [], "decoder_weights_dist": [],
    }  # fmt: skip


def _activations(feature: Mapping[str, Any], release: Release) -> Iterable[dict[str, Any]]:
    """The strongest are a group of their own, whose bounds are -1; of a sample's group, its bounds and its share."""
    groups: dict[int, list[float]] = {}
    for example in feature["examples"]:
        groups.setdefault(example["quantile"], []).append(example["activation"])
    samples = sum(quantile >= 0 for quantile in groups)
    for number, example in enumerate(feature["examples"]):
        values, tokens, quantile = example["activations"], example["tokens"], example["quantile"]
        assert 1 <= len(tokens) == len(values) <= _TOKENS
        assert all(map(math.isfinite, values))
        bounds = (-1, -1, -1) if quantile < 0 else (min(groups[quantile]), max(groups[quantile]), 1 / samples)
        yield {
            "id": _id(release, feature["row"]["feature"], number), **_named(feature, release), "creatorId": release.creator,
            "tokens": tokens, "values": values, "maxValue": max(values), "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values), "dfaValues": [], "dfaTargetIndex": None, "dfaMaxValue": None, "lossValues": [],
            "logitContributions": None, "binMin": bounds[0], "binMax": bounds[1], "binContains": bounds[2],
            "qualifyingTokenIndex": example["peak"], "dataIndex": None, "dataSource": release.dataset,
        }  # fmt: skip


def _explanation(feature: Mapping[str, Any], release: Release) -> dict[str, Any]:
    said = feature["explained"]
    return {
        "id": _id(release, feature["row"]["feature"], "explanation"), **_named(feature, release),
        "description": said["explanation"][:CHARACTERS], "authorId": release.creator, "triggeredById": release.creator,
        "typeName": None, "explanationModelName": None, "notes": said["explainer"].partition(" at ")[0],
    }  # fmt: skip


def hook_name(kind: str, layer: int) -> str:
    """As TransformerLens has it; ours where it has none."""
    return f"blocks.{layer}.{_HOOKS[kind]}" if kind in _HOOKS else f"{kind}.{layer}"


def _id(release: Release, *parts: Any) -> str:
    """25 characters that begin with c, as the database's."""
    number = int.from_bytes(hashlib.sha256(repr((release.model_id, release.source, *parts)).encode()).digest())
    characters = []
    for _ in range(24):
        number, digit = divmod(number, 36)
        characters.append(_ALPHABET[digit])
    return "c" + "".join(characters)
