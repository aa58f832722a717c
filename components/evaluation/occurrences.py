"""Kinds of token in running text, each a few times: their activations, features and labels."""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

import numpy as np
import torch

from components.corpus.tokens import read_sequences
from components.evaluation.absorption import Occurrences
from components.evaluation.held_out import HeldOut, right_padded
from components.evaluation.passages import Reader
from components.evaluation.settings import AbsorptionSettings
from components.evaluation.token_classes import CLASSES, TokenClasses


def token_labels(tokenizer: Any, kinds: np.ndarray, settings: AbsorptionSettings) -> tuple[np.ndarray, tuple[str, ...]]:
    """Of token ids `[n]` their labels `[n]`, -1 for those that have none, as indices into the names."""
    if settings.labels == "token_class":
        return TokenClasses(tokenizer).of(kinds[:, None])[:, 0], CLASSES
    words = [tokenizer.decode([kind]).strip() for kind in kinds.tolist()]
    letters = string.ascii_lowercase
    found = [letters.index(word[0].lower()) if len(word) > 1 and word.isascii() and word.isalpha() else -1 for word in words]
    return np.array(found, dtype=np.int64), tuple(letters)


def read_occurrences(reader: Reader, text: HeldOut, tokenizer: Any, settings: AbsorptionSettings) -> Occurrences:
    """The first occurrences of every kind of token with a label, in training sequences that are spread evenly."""
    from scipy.sparse import csr_matrix, vstack

    split = text.manifest.splits["train"]
    chosen = min(split.sequences, -(-settings.tokens * split.sequences // split.tokens))
    seen: Counter[int] = Counter()
    rows, features, kinds = [], [], []
    for number in (np.arange(chosen) * split.sequences // chosen).tolist():
        block = right_padded(read_sequences(text.url, text.manifest, "train", number, number + 1))
        ids = block.tokens[0]
        activations, counted = reader.activations(block)
        wanted = []
        for place in np.flatnonzero(counted[0].cpu().numpy() & (token_labels(tokenizer, ids, settings)[0] >= 0)).tolist():
            seen[int(ids[place])] += 1
            if seen[int(ids[place])] <= settings.occurrences:
                wanted.append(place)
        if not wanted:
            continue
        x = activations[0, wanted]
        with torch.no_grad():
            features.append(csr_matrix(reader.sae.reconstruct(x)[0].dense().float().cpu().numpy()))
        rows.append(x.float().cpu().numpy())
        kinds.append(ids[wanted])
    every = np.concatenate(kinds)
    labels, names = token_labels(tokenizer, every, settings)
    return Occurrences(x=np.concatenate(rows), features=vstack(features).tocsr(), kinds=every, labels=labels, names=names)
