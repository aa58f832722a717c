"""What the spans of a text give, and the whole that it adds up to: plain arrays, wherever the spans were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from components.evaluation.features import FeatureSums
from components.evaluation.intervals import DocumentGroups
from components.evaluation.metrics import PER_VARIANT, SHARED, Sums, Totals, column_names


@dataclass(frozen=True, kw_only=True)
class SpanSums:
    """Sums over one span by document, by place in the sequence and by class of token."""

    variants: tuple[str, ...]
    documents: np.ndarray
    """Ids in the order in which they were seen."""
    by_document: Sums
    """The first document has a row of its own, the others share the rows after it (see `DocumentGroups`)."""
    by_position: Sums
    """Group 0 is place 0, group g holds the places from `2^(g-1)` to `2^g - 1`."""
    by_class: Sums | None
    features: FeatureSums | None = None
    """On the CPU."""
    device: str = "cpu"
    """The kind of device that measured."""

    def of(self, names: Mapping[str, str], features: FeatureSums | None = None) -> SpanSums:
        """What one of several coders that were measured together would have found alone. names: of its variants, each with the
        one that it has here."""
        columns = {name: place for place, name in enumerate(column_names(self.variants))}
        kept = [columns[name] for name in SHARED]
        kept += [columns[f"{here}.{name}"] for here in names.values() for name in PER_VARIANT]

        def part(sums: Sums) -> Sums:
            return Sums(sums.table[:, kept], sums.shifted)

        return SpanSums(
            variants=tuple(names),
            documents=self.documents,
            by_document=part(self.by_document),
            by_position=part(self.by_position),
            by_class=None if self.by_class is None else part(self.by_class),
            features=features,
            device=self.device,
        )


class Measured(SpanSums):
    """The same sums over the whole text; a document that several spans hold parts of is one again."""

    def totals(self) -> Totals:
        return Totals(self.by_document.table.sum(axis=0), self.by_document.shifted.sum(axis=0), self.variants)


def merged(parts: Sequence[SpanSums]) -> Measured:
    """The whole text from its spans, in their order. No sum depends on where they were cut, but for its rounding."""
    groups = DocumentGroups()
    # Only its first document can be known from an earlier span. The others are new, numbered without a gap, so that all
    # documents of a row belong to the group of the one that opened it.
    rows = [groups.of(part.documents)[: len(part.by_document.table)] for part in parts]
    columns, d_in = parts[0].by_document.table.shape[1], parts[0].by_document.shifted.shape[1]
    by_document = Sums(np.zeros((groups.used, columns)), np.zeros((groups.used, d_in)))
    for part, places in zip(parts, rows, strict=True):
        np.add.at(by_document.table, places, part.by_document.table)
        np.add.at(by_document.shifted, places, part.by_document.shifted)
    return Measured(
        variants=parts[0].variants,
        documents=groups.documents,
        by_document=by_document,
        by_position=_added([part.by_position for part in parts]),
        by_class=_added([part.by_class for part in parts if part.by_class is not None]) if parts[0].by_class else None,
        features=_features([part.features for part in parts if part.features is not None]),
        device=parts[0].device,
    )


def _added(parts: Sequence[Sums]) -> Sums:
    return Sums(np.sum([part.table for part in parts], axis=0), np.sum([part.shifted for part in parts], axis=0))


def _features(parts: Sequence[FeatureSums]) -> FeatureSums | None:
    if not parts:
        return None
    whole = FeatureSums(len(parts[0].fired), torch.device("cpu"))
    for part in parts:
        whole.include(part)
    return whole
