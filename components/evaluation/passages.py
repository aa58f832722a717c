"""Labelled text -> passages of tokens -> the means over each of activations, of features, and of an untrained dictionary's."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.activations.dataset.forward import counted_tokens
from components.activations.exclusion import Exclusion
from components.corpus.encoder import Encoder
from components.corpus.labelled import LabelledText
from components.corpus.tokens import PADDING, SPECIAL, Sequences
from components.evaluation.baselines import largest_of, unit_rows
from components.evaluation.measurements import Autoencoder
from components.evaluation.probing import Passages, dealt
from components.evaluation.settings import ProbingSettings
from components.language_model.hook_points import HookPoint, capture
from components.progress import progress
from components.settings import UserError

_SHORTEST = 16
"""Tokens of a passage, at least, unless the whole text has fewer."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What turns a passage's tokens into what probes read."""

    model: nn.Module
    points: tuple[HookPoint, ...]
    """What the SAE reads, side by side."""
    sae: Autoencoder
    d_sae: int
    mean: Tensor
    """`[d_in]`, of training activations: what the untrained dictionary is centred at."""
    l0: int
    """How many of its directions the untrained dictionary takes for each token: as many as the SAE."""
    exclusion: Exclusion
    device: torch.device
    batch_sequences: int

    def activations(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """`[n, length, d_in]`, float32 or wider, and which of them count, bool `[n, length]`."""
        ids = torch.tensor(sequences.tokens).to(self.device).long()
        captured = capture(self.model, list(self.points), {"input_ids": ids})
        counted = torch.tensor(counted_tokens(sequences, self.exclusion)).to(self.device)
        columns = []
        for point in self.points:
            column = captured[point].to(torch.promote_types(captured[point].dtype, torch.float32))
            limit = self.exclusion.norm_limits.get(str(point))
            counted = counted if limit is None else counted & (column.norm(dim=-1) <= limit)
            columns.append(column)
        return torch.cat(columns, dim=-1), counted


def chosen_texts(texts: Iterable[LabelledText], settings: ProbingSettings, field: str) -> dict[str, list[LabelledText]]:
    """The texts of each label that is probed: the labels of most documents, of each as many as passages may be needed, in an
    order that depends on names alone. A UserError where fewer than two labels have a document for every fold."""
    by_label: dict[str, list[LabelledText]] = {}
    seen = set()
    for text in texts:
        if (key := (text.label, text.text)) not in seen:  # else a copy would be tested by a probe that has seen it
            seen.add(key)
            by_label.setdefault(text.label, []).append(text)
    ranked = sorted(by_label.items(), key=lambda item: (-len(item[1]), item[0]))
    enough = [(label, found) for label, found in ranked if len(found) >= settings.folds]
    if len(enough) < 2:
        raise UserError(
            f"{field}: {len(enough)} of its {len(ranked)} labels have at least {settings.folds} documents "
            "(evaluation.probing.folds); accepted are at least 2"
        )
    if len(enough) < len(ranked):
        logger.info("%s: %d labels have fewer than %d documents", field, len(ranked) - len(enough), settings.folds)
    kept: dict[str, list[LabelledText]] = {}
    for label, found in sorted(enough[: settings.labels]):
        order = dealt([text.document for text in found], len(found)).argsort()
        kept[label] = [found[place] for place in order[: settings.passages_per_label]]
    return kept


def cut(
    texts: dict[str, list[LabelledText]], settings: ProbingSettings, encoder: Encoder, bos: int | None, length: int
) -> tuple[Sequences, np.ndarray, np.ndarray]:
    """Passages as sequences of `length` tokens, padded on the right; their labels and documents, `[n]` each.

    bos: in front of each; none where it is None. A text gives its first pieces after all texts of its label gave one.
    """
    room = length - (bos is not None)
    every = sorted({text.document for found in texts.values() for text in found})
    numbers = {name: number for number, name in enumerate(every)}
    pieces: list[tuple[list[int], int, int]] = []
    for label, found in enumerate(texts.values()):
        encoded = [_pieces(list(ids), room, settings.passages_per_document) for ids in encoder.encode([t.text for t in found])]
        turns = [(place, number) for number, cuts in enumerate(encoded) for place in range(len(cuts))]
        for place, number in sorted(turns)[: settings.passages_per_label]:
            pieces.append((encoded[number][place], label, numbers[found[number].document]))
    tokens = np.zeros((len(pieces), length), dtype=np.int64)
    documents = np.full((len(pieces), length), PADDING, dtype=np.int64)
    for row, (ids, _, document) in enumerate(pieces):
        start = 0
        if bos is not None:
            tokens[row, 0], documents[row, 0], start = bos, SPECIAL, 1
        tokens[row, start : start + len(ids)] = ids
        documents[row, start : start + len(ids)] = document
    labels = np.array([label for _, label, _ in pieces], dtype=np.int64)
    owners = np.unique(np.array([document for _, _, document in pieces]), return_inverse=True)[1]
    positions = np.zeros_like(tokens)
    return Sequences(tokens=tokens, documents=documents, positions=positions), labels, owners


def read(reader: Reader, sequences: Sequences, labels: np.ndarray, owners: np.ndarray, names: tuple[str, ...]) -> Passages:
    """Means over the counted tokens of each passage; one without any is left out."""
    rows = unit_rows(reader.d_sae, len(reader.mean)).to(reader.device)
    mean = reader.mean.to(reader.device)
    found: dict[str, list[Tensor]] = {"sae": [], "coordinates": [], "random_directions": []}
    kept = []
    with progress(logger, "probing", len(sequences), "passages") as advance, torch.no_grad():
        for start in range(0, len(sequences), reader.batch_sequences):
            block = sequences[start : start + reader.batch_sequences]
            for row, (passage, counted) in enumerate(zip(*reader.activations(block), strict=True)):
                x = passage[counted]
                if len(x) == 0:
                    continue
                kept.append(start + row)
                features, _ = reader.sae.reconstruct(x)
                chance = largest_of(torch.relu((x - mean.to(x)) @ rows.to(x).T), reader.l0).double().sum(dim=0)
                sums = {"sae": features.sums(), "coordinates": x.double().sum(dim=0), "random_directions": chance}
                for name, values in sums.items():
                    found[name].append((values / len(x)).float().cpu())
            advance(len(block), "")
    if len(set(labels[kept].tolist())) < 2:
        raise UserError(
            "evaluation.probing: activations.exclude leaves no token in all passages of but one label; exclude fewer"
        )
    means = {name: torch.stack(parts).numpy() for name, parts in found.items()}
    documents = np.unique(owners[kept], return_inverse=True)[1]
    return Passages(values=means, labels=labels[kept], documents=documents, names=names)


def _pieces(ids: list[int], room: int, most: int) -> list[list[int]]:
    """At most `most` pieces of `room` tokens, spread evenly over the text."""
    every = [ids[start : start + room] for start in range(0, len(ids), room)]
    long = [piece for piece in every if len(piece) >= min(_SHORTEST, room)] or [piece for piece in every[:1] if piece]
    return [long[place * len(long) // min(most, len(long))] for place in range(min(most, len(long)))]
