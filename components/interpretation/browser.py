"""The feature browser: a folder of static files that opens from a disk, a web server or an artifact store, with no network.

`index.js` has the numbers of all features; `words/*.js` what the table says of each, `blocks/*.js` all that its page shows;
of an image corpus `pictures/*.jpg` are the images.
They are scripts, since a page from a disk may load nothing else, and pieces, so that a page costs one of them whatever the
number of features.
"""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import Any

import numpy as np

from components import storage
from components.evaluation.record import About
from components.evaluation.stability import COUNTS
from components.interpretation.described import FeatureData
from components.interpretation.feature_data import FEATURES_PER_GROUP
from components.interpretation.matches import gone_features
from components.interpretation.pictures import Pictures

FOLDER = "browser"
FEATURES_PER_PIECE = 8 * FEATURES_PER_GROUP
"""Of what the table says of each."""
FIRST = 100
"""Rows of the first table, which are shown before any piece is there."""
STATUSES = ("", "persisted", "split", "new")
_WORDS = ("tokens", "logits", "explanation")
_NUMBERS = ("density", "max", "mean", "score")
_GONE = ("feature", "status", "nearest", "cosine", "density")
_STATIC = ("browser.css", "data.js", "page.js", "map.js", "browser.js", "index.html")
"""The page last: a folder without one is not whole."""
_ESCAPES = {"\u2028": "\\u2028", "\u2029": "\\u2029", "<": "\\u003c"}


def write_browser(sae_url: str, about: About, data: FeatureData) -> str:
    """Put the browser of a coder's feature data beside it; the address of its page. Memory: the table's words."""
    target, site = storage.join(sae_url, FOLDER), Site()
    for document, content in data.pictures.files() if data.pictures is not None else ():
        storage.put_bytes(content, storage.join(target, "pictures", f"{document}.jpg"))
    for first in range(0, data.d_sae, FEATURES_PER_GROUP):
        block = [data.feature(feature) for feature in range(first, min(first + FEATURES_PER_GROUP, data.d_sae))]
        for feature in block:
            feature["sequences"] = feature["row"]["sequences"]
            site.add(feature.pop("row"))
        site.put_block(target, first // FEATURES_PER_GROUP, block)
    name = f"{about.name}: {about.architecture}, {about.d_sae:,} features of {about.language_model} at {about.hook_point}"
    return site.finish(target, name, _compared(sae_url, data), data.pictures)


class Site:
    """Rows of the table, added in the order of features, and what is written of them."""

    def __init__(self) -> None:
        self._numbers: dict[str, list[float]] = {name: [] for name in (*_NUMBERS, "x", "y")}
        self._statuses, self._words = list[int](), list[list[Any]]()

    def add(self, row: dict[str, Any]) -> None:
        place = row["place"] or (np.nan, np.nan)
        for name, value in {**{name: row[name] for name in _NUMBERS}, "x": place[0], "y": place[1]}.items():
            self._numbers[name].append(np.nan if value is None else value)
        self._statuses.append(STATUSES.index(row["status"]))
        self._words.append([*(row[name] for name in _WORDS), *([row["patches"]] if "patches" in row else [])])

    def put_block(self, target: str, number: int, block: list[dict[str, Any]]) -> None:
        _put(storage.join(target, "blocks", f"{number:05d}.js"), f"block({number}, {_json(block)});")

    def finish(self, target: str, about: str, compared: dict[str, Any] | None, pictures: Pictures | None = None) -> str:
        for number, first in enumerate(range(0, len(self._words), FEATURES_PER_PIECE)):
            piece = self._words[first : first + FEATURES_PER_PIECE]
            _put(storage.join(target, "words", f"{number:05d}.js"), f"words({number}, {_json(piece)});")
        densities = np.array(self._numbers["density"])
        densest = np.argsort(-densities, kind="stable")[:FIRST].tolist()
        index = {
            "about": about, "count": len(self._words), "block": FEATURES_PER_GROUP, "piece": FEATURES_PER_PIECE,
            "pictures": pictures is not None, "grid": None if pictures is None else pictures.layout.grid,
            "of_text": pictures is None or pictures.layout.of_text,
            "explained": sum(bool(words[_WORDS.index("explanation")]) for words in self._words), "compared": compared,
            "columns": {name: _packed(np.array(values, "<f4")) for name, values in self._numbers.items()},
            "statuses": _packed(np.array(self._statuses, np.uint8)),
            "first": [[feature, *self._words[feature]] for feature in densest if densities[feature] > 0],
        }  # fmt: skip
        _put(storage.join(target, "index.js"), f"index({_json(index)});")
        for file in _STATIC:
            source = resources.files("components.interpretation").joinpath("browser", file)
            storage.put_bytes(source.read_bytes(), storage.join(target, file))
        return storage.join(target, "index.html")


def _compared(sae_url: str, data: FeatureData) -> dict[str, Any] | None:
    matches = data.matches
    if matches is None:
        return None
    whole = ("feature", "status", "nearest")
    return {
        "with": f"version {matches.version} of {matches.registered_model}",
        "counts": {name: matches.counts[name] for name in COUNTS},
        "kept": matches.counts["kept_share"],
        "browser": _beside(matches.folder),
        "versions": {one.version: _beside(one.folder) for one in data.earlier},
        "gone": [
            [row[name] if name in whole or row[name] is None else float(f"{row[name]:.4g}") for name in _GONE]
            for row in gone_features(sae_url)
        ],
    }


def _beside(folder: str | None) -> str | None:
    """The browser of another coder, seen from one's own."""
    return None if folder is None else f"../../{folder}/{FOLDER}/index.html"


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _json(value: Any) -> str:
    """JSON that is a JavaScript expression too, and holds no `<`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _put(url: str, text: str) -> None:
    storage.put_bytes(text.encode("utf-8", errors="replace"), url)
