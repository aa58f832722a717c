"""Spans that are done outlive an interruption: the sums of each lie beside the data until the evaluation is whole."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from components import storage
from components.evaluation.features import FeatureSums
from components.evaluation.job import Span
from components.evaluation.metrics import Sums
from components.evaluation.span_totals import SpanSums

TOKENS = 100_000
"""Of a span, about: at most so many are measured again after an interruption."""
_TABLES, _FEATURES = ("by_document", "by_position", "by_class"), ("fired", "activation", "largest")

logger = logging.getLogger(__name__)


def parts(tokens: int, workers: int) -> int:
    """Into how many spans `tokens` are cut: none much longer than `TOKENS`, and every worker the same number."""
    return workers * max(1, -(-tokens // (workers * TOKENS)))


@dataclass(frozen=True)
class KeptSpans:
    """What one evaluation has measured so far. Safe for workers that measure different spans at once."""

    url: str
    """A folder of its own."""

    def sums(self, kind: str, span: Span, measure: Callable[[], SpanSums]) -> SpanSums:
        """Those of the span, from an earlier attempt where it got that far. kind: of the pass."""
        return sums_together([self], kind, span, lambda _: [measure()])[0]

    def find(self, kind: str, span: Span) -> SpanSums | None:
        url = self._url_of(kind, span)
        if not storage.exists(url):
            return None
        try:
            found = _unpacked(storage.read_bytes(url))
        except (ValueError, KeyError, zipfile.BadZipFile):
            logger.warning("%s is damaged, and measured again", url)
            return None
        logger.info("%s: %d tokens were measured before the interruption", kind, span.tokens)
        return found

    def put(self, kind: str, span: Span, sums: SpanSums) -> None:
        storage.put_bytes(_packed(sums), self._url_of(kind, span))

    def _url_of(self, kind: str, span: Span) -> str:
        return storage.join(self.url, f"{kind}-{span.sequences.start}-{span.sequences.stop}-{span.tokens}.npz")

    def forget(self) -> None:
        """Once the record is written."""
        storage.delete(self.url)


def sums_together(
    kept: Sequence[KeptSpans], kind: str, span: Span, measure: Callable[[list[int]], list[SpanSums]]
) -> list[SpanSums]:
    """As `KeptSpans.sums`, of several evaluations. measure: gets the places of those that have nothing of the span yet."""
    found = {place: sums for place, one in enumerate(kept) if (sums := one.find(kind, span)) is not None}
    missing = [place for place in range(len(kept)) if place not in found]
    for place, sums in zip(missing, measure(missing) if missing else [], strict=True):
        kept[place].put(kind, span, sums)
        found[place] = sums
    return [found[place] for place in range(len(kept))]


def _packed(sums: SpanSums) -> bytes:
    """Plain arrays, from which nothing can be run."""
    arrays: dict[str, Any] = {
        "variants": np.array(sums.variants), "device": np.array(sums.device), "documents": sums.documents
    }  # fmt: skip
    for name in _TABLES:
        part: Sums | None = getattr(sums, name)
        if part is not None:
            arrays |= {f"{name}.table": part.table, f"{name}.shifted": part.shifted}
    if sums.features is not None:
        arrays |= {f"features.{name}": getattr(sums.features, name).numpy() for name in _FEATURES}
        arrays["features.tokens"] = np.array(sums.features.tokens)
    with io.BytesIO() as stream:
        np.savez(stream, **arrays)
        return stream.getvalue()


def _unpacked(content: bytes) -> SpanSums:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
    tables = {
        name: Sums(arrays[f"{name}.table"], arrays[f"{name}.shifted"]) if f"{name}.table" in arrays else None
        for name in _TABLES
    }
    features = None
    if "features.tokens" in arrays:
        features = FeatureSums(len(arrays["features.fired"]), torch.device("cpu"))
        features.tokens = int(arrays["features.tokens"])
        for name in _FEATURES:
            setattr(features, name, torch.from_numpy(arrays[f"features.{name}"]))
    by_document, by_position = tables["by_document"], tables["by_position"]
    if by_document is None or by_position is None:
        raise ValueError("a table is missing")
    return SpanSums(
        variants=tuple(str(name) for name in arrays["variants"]),
        documents=arrays["documents"],
        by_document=by_document,
        by_position=by_position,
        by_class=tables["by_class"],
        features=features,
        device=str(arrays["device"]),
    )
