"""What is known of each feature, from all tables beside the coder, as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from components import storage
from components.interpretation.explanations.table import Explanation
from components.interpretation.feature_data import FEATURES_PER_GROUP
from components.interpretation.history import Earlier, history
from components.interpretation.matches import MatchesRecord, matched_features
from components.interpretation.pictures import Pictures
from components.interpretation.record import interpretation_url

WINDOW = 24
_SHOWN_WORDS, _SHOWN_PATCHES = 6, 3

Decode = Callable[[int], str]


class FeatureData:
    """Of the coder at `sae_url`. Memory: a row per feature; the examples of `FEATURES_PER_GROUP` features at a time.

    decode: the text of one token. matches, explanations: what lies there of them. earlier: see `read_history`. pictures: of an
    image corpus.
    """

    def __init__(
        self,
        sae_url: str,
        decode: Decode,
        matches: MatchesRecord | None = None,
        explanations: Mapping[int, Explanation] | None = None,
        earlier: Sequence[Earlier] = (),
        pictures: Pictures | None = None,
    ) -> None:
        self.pictures = pictures
        self.matches, self.explanations, self.earlier = matches, explanations or {}, earlier
        self._words, url = Words(decode), interpretation_url(sae_url)
        self._matches = {} if matches is None else matched_features(sae_url)
        with storage.local_copies(url, ("examples.parquet", "features.parquet")) as folder:
            self._file = _opened(folder / "examples.parquet")
            self._effects = pq.read_table(folder / "features.parquet")
        with storage.local_copies(sae_url, ("features.parquet",)) as folder:
            self._measured = pq.read_table(folder / "features.parquet")
        self.d_sae = len(self._effects)
        self._firsts = [self._first_of(group) for group in range(self._file.num_row_groups)]
        self._block, self._rows, self._examples = -1, list[dict[str, Any]](), dict[int, list[dict[str, Any]]]()

    def feature(self, feature: int, window: int = WINDOW) -> dict[str, Any]:
        """Its `row` of the table, the tokens and features beside it, neighbours, what it makes likely and unlikely, what it
        was in earlier versions, and examples of at most `window` tokens to each side."""
        known, examples = self._load(feature)
        likely, unlikely = self._logits(known)
        words, match, said = self._words, self._matches.get(feature), self.explanations.get(feature)
        strongest = [one for one in examples if one["kind"] == "strongest"]
        peaks = dict.fromkeys(self._peak(one) for one in strongest)
        shown = _SHOWN_WORDS if self.pictures is None else _SHOWN_PATCHES
        columns = ("token_ids", "token_shares", "token_means", "token_largest")
        tokens = zip(*(known.get(name) or () for name in columns), strict=True)
        together = zip(*(known.get(name) or () for name in ("together", "together_shares", "together_overlaps")), strict=True)
        near = zip(known.get("neighbours") or (), known.get("neighbour_cosines") or (), strict=True)
        return {
            "examples": [self._example(one, window) for one in examples],
            "histogram": {"edges": [_short(edge) for edge in known["histogram_edges"]], "counts": known["histogram"]},
            "tokens": [[words(token), *map(_short, numbers)] for token, *numbers in tokens],
            "together": [[other, *map(_short, numbers)] for other, *numbers in together],
            "likely": likely,
            "unlikely": unlikely,
            "neighbours": [[other, _short(cosine)] for other, cosine in near],
            "explained": said and said.model_dump(exclude={"feature"}),
            "history": [
                {name: _short(value) if isinstance(value, float) else value for name, value in row.items()}
                for row in history(feature, self.earlier)
            ],
            "match": match and {**match, "cosine": None if match["cosine"] is None else _short(match["cosine"])},
            "row": {
                "feature": feature,
                "explanation": said.explanation if said else "",
                "score": said and said.detection,
                "status": match["status"] if match else "",
                "place": _place(known),
                "density": _short(known["density"]),
                "max": _short(known["max_activation"]),
                "mean": _short(known["mean_activation"]),
                "sequences": known["sequences"],
                "tokens": (" " if self.pictures is None else " · ").join(list(peaks)[:shown]),
                **({} if self.pictures is None else {"patches": [self._tile(one) for one in strongest[:shown]]}),
                "logits": " ".join(word for word, _ in likely[:_SHOWN_WORDS]),
            },
        }

    def _first_of(self, group: int) -> int:
        """The first feature of a row group; a group without rows is as the one before it."""
        found = self._file.metadata.row_group(group).column(0).statistics
        return int(found.min) if found is not None and found.has_min_max else -1

    def _load(self, feature: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        block = feature // FEATURES_PER_GROUP
        if block != self._block:
            first = block * FEATURES_PER_GROUP
            tables = (self._measured, self._effects)
            parts = [table.slice(first, FEATURES_PER_GROUP).to_pylist() for table in tables]
            self._rows = [measured | effects for measured, effects in zip(*parts, strict=True)]
            self._examples = {number: [] for number in range(first, first + FEATURES_PER_GROUP)}
            last = np.array([group for group, start in enumerate(self._firsts) if -1 < start < first + FEATURES_PER_GROUP])
            before = [group for group in last if self._firsts[group] <= first][-1:]
            groups = sorted({*before, *(group for group in last if self._firsts[group] > first)})
            for one in self._file.read_row_groups([int(group) for group in groups]).to_pylist() if groups else ():
                if one["feature"] in self._examples:
                    self._examples[one["feature"]].append(one)
            self._block = block
        return self._rows[feature % FEATURES_PER_GROUP], self._examples[feature]

    def _logits(self, known: Mapping[str, Any]) -> tuple[list[list[Any]], list[list[Any]]]:
        if known.get("logit_tokens") is None:
            return [], []
        ids, effects = known["logit_tokens"], known["logit_effects"]
        pairs = [[self._words(token), _short(effect)] for token, effect in zip(ids, effects, strict=True)]
        return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]

    def _peak(self, found: dict[str, Any]) -> str:
        """What an example is an example of."""
        if self.pictures is None or (self.pictures.layout.of_text and self.pictures.patch(found["place"]) is None):
            return self._words(found["tokens"][found["place"]])
        return self.pictures.where(found["document"], found["place"])

    def _tile(self, found: dict[str, Any]) -> list[int]:
        """The image of an example, and row and column of its patch, where it is one."""
        assert self.pictures is not None
        return [found["document"], *(self.pictures.patch(found["place"]) or ())]

    def _example(self, found: dict[str, Any], width: int) -> dict[str, Any]:
        if self.pictures is not None:
            shown = self.pictures.described(found)
            for name in ("activations", "patches"):
                shown[name] = [_short(value) if value else 0 for value in shown[name]]
            shown["tokens"] = [self._words(token) for token in shown["tokens"]]
            kept = ("kind", "quantile", "document", "position")
            return {**{name: found[name] for name in kept}, "activation": _short(found["activation"]), **shown}
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
            "activations": [_short(value) if value else 0 for value in found["activations"][window]],
        }


class Words:
    """The text of tokens, each decoded once."""

    def __init__(self, decode: Decode) -> None:
        self._decode, self._known = decode, dict[int, str]()

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode(token)
        return self._known[token]


def _opened(path: Path) -> pq.ParquetFile:
    """A file that may be deleted once it is open."""
    return pq.ParquetFile(path.open("rb"))


def _place(known: Mapping[str, Any]) -> list[float] | None:
    if known.get("map_x") is None or math.isnan(known["map_x"]):
        return None
    return [_short(known[name]) for name in ("map_x", "map_y")]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
