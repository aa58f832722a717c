"""The feature browser: a folder of static files that opens from a disk, a web server or an artifact store, with no network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from components import storage
from components.evaluation.record import About
from components.evaluation.stability import COUNTS
from components.interpretation.explanations.table import Explanation
from components.interpretation.matches import MatchesRecord, gone_features, matched_features
from components.interpretation.record import interpretation_url

FOLDER = "browser"
_WINDOW = 24
_FEATURES_PER_BLOCK = 64
_SHOWN_WORDS = 6
_GONE = ("feature", "status", "nearest", "cosine", "density")
_STATIC = ("index.html", "browser.css", "browser.js", "map.js")
_LINE_ENDS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "<": "\\u003c"}

Decode = Callable[[int], str]


def write_browser(sae_url: str, about: About, data: FeatureData) -> str:
    """Put the browser of a coder's feature data beside it; the address of its page."""
    target, rows, matches = storage.join(sae_url, FOLDER), list[dict[str, Any]](), data.matches
    for number, first in enumerate(range(0, data.d_sae, _FEATURES_PER_BLOCK)):
        block = [data.feature(feature) for feature in range(first, min(first + _FEATURES_PER_BLOCK, data.d_sae))]
        rows += [feature.pop("row") for feature in block]
        _put(storage.join(target, "blocks", f"{number:05d}.js"), f"block({number}, {_json(block)});")
    name = f"{about.name}: {about.architecture}, {about.d_sae:,} features of {about.language_model} at {about.hook_point}"
    table = {"about": name, "block": _FEATURES_PER_BLOCK, "compared": None, "features": rows}
    if matches is not None:
        table["compared"] = {
            "with": f"version {matches.version} of {matches.registered_model}",
            "counts": {name: matches.counts[name] for name in COUNTS},
            "kept": matches.counts["kept_share"],
            "browser": None if matches.folder is None else f"../../{matches.folder}/{FOLDER}/index.html",
            "gone": [
                [
                    row[name] if name in ("feature", "status", "nearest") or row[name] is None else _short(row[name])
                    for name in _GONE
                ]
                for row in gone_features(sae_url)
            ],
        }
    _put(storage.join(target, "table.js"), f"const TABLE = {_json(table)};")
    for file in _STATIC:
        source = resources.files("components.interpretation").joinpath("browser", file)
        storage.put_bytes(source.read_bytes(), storage.join(target, file))
    return storage.join(target, "index.html")


class FeatureData:
    """What is known of each feature of the coder at `sae_url`, as plain JSON. Memory: the tables.

    decode: the text of one token. matches, explanations: what lies there of them.
    """

    def __init__(
        self,
        sae_url: str,
        decode: Decode,
        matches: MatchesRecord | None = None,
        explanations: Mapping[int, Explanation] | None = None,
    ) -> None:
        self.matches, self.explanations = matches, explanations or {}
        self._words, url = Words(decode), interpretation_url(sae_url)
        self._matches = {} if matches is None else matched_features(sae_url)
        with storage.local_copies(url, ("examples.parquet", "features.parquet")) as folder:
            self._examples = pq.read_table(folder / "examples.parquet").combine_chunks()
            self._effects: dict[str, list[Any]] = pq.read_table(folder / "features.parquet").to_pydict()
        with storage.local_copies(sae_url, ("features.parquet",)) as folder:
            self._measured: dict[str, list[Any]] = pq.read_table(folder / "features.parquet").to_pydict()
        self.d_sae = len(self._effects["feature"])
        found = self._examples["feature"].to_numpy()
        self._starts = np.searchsorted(found, np.arange(self.d_sae + 1)).tolist()

    def feature(self, feature: int, window: int = _WINDOW) -> dict[str, Any]:
        """Its `row` of the table, neighbours, what it makes likely and unlikely, and examples of at most `window` tokens to
        each side."""
        start, stop = self._starts[feature : feature + 2]
        examples = self._examples.slice(start, stop - start).to_pylist()
        likely, unlikely = self._logits(feature)
        measured, words, match = self._measured, self._words, self._matches.get(feature)
        said = self.explanations.get(feature)
        peaks = dict.fromkeys(words(one["tokens"][one["place"]]) for one in examples if one["kind"] == "strongest")
        listed = "neighbours" in measured
        near = zip(measured["neighbours"][feature], measured["neighbour_cosines"][feature], strict=True) if listed else ()
        return {
            "examples": [self._example(one, window) for one in examples],
            "histogram": {
                "edges": [_short(edge) for edge in self._effects["histogram_edges"][feature]],
                "counts": self._effects["histogram"][feature],
            },
            "likely": likely,
            "unlikely": unlikely,
            "neighbours": [[other, _short(cosine)] for other, cosine in near],
            "explained": said and said.model_dump(exclude={"feature"}),
            "match": match and {**match, "cosine": None if match["cosine"] is None else _short(match["cosine"])},
            "row": {
                "feature": feature,
                "explanation": said.explanation if said else "",
                "score": said and said.detection,
                "status": match["status"] if match else "",
                "place": self._place(feature),
                "density": _short(measured["density"][feature]),
                "max": _short(measured["max_activation"][feature]),
                "mean": _short(measured["mean_activation"][feature]),
                "sequences": self._effects["sequences"][feature],
                "tokens": " ".join(list(peaks)[:_SHOWN_WORDS]),
                "logits": " ".join(word for word, _ in likely[:_SHOWN_WORDS]),
            },
        }

    def _place(self, feature: int) -> list[float] | None:
        if "map_x" not in self._effects or math.isnan(self._effects["map_x"][feature]):
            return None
        return [_short(self._effects[name][feature]) for name in ("map_x", "map_y")]

    def _logits(self, feature: int) -> tuple[list[list[Any]], list[list[Any]]]:
        if "logit_tokens" not in self._effects:
            return [], []
        ids, effects = self._effects["logit_tokens"][feature], self._effects["logit_effects"][feature]
        pairs = [[self._words(token), _short(effect)] for token, effect in zip(ids, effects, strict=True)]
        return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]

    def _example(self, found: dict[str, Any], width: int) -> dict[str, Any]:
        first = max(0, found["place"] - width)
        window = slice(first, found["place"] + width + 1)
        return {
            "kind": found["kind"],
            "quantile": found["quantile"],
            "activation": _short(found["activation"]),
            "document": found["document"],
            "position": found["position"],
            "peak": found["place"] - first,
            "tokens": [self._words(token) for token in found["tokens"][window]],
            "activations": [_short(value) for value in found["activations"][window]],
        }


class Words:
    """The text of tokens, each decoded once."""

    def __init__(self, decode: Decode) -> None:
        self._decode, self._known = decode, dict[int, str]()

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode(token)
        return self._known[token]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _json(value: Any) -> str:
    """JSON that is a JavaScript expression too, and holds no `<`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _LINE_ENDS.items():
        text = text.replace(character, escape)
    return text


def _put(url: str, text: str) -> None:
    storage.put_bytes(text.encode("utf-8", errors="replace"), url)
