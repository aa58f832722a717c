"""Features of a vision-language model that fire on images and on text (paper: features are multimodal)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.interpretation.activations import Batch


@dataclass
class Kind:
    """What each feature does on one kind of token; arrays `[d_sae]`."""

    fired: np.ndarray
    largest: np.ndarray
    first: np.ndarray
    """Where it does most: the number of the image or text, -1 for nowhere; of equal ones, the first."""
    second: np.ndarray
    """And the place there."""
    tokens: int = 0

    @classmethod
    def of(cls, d_sae: int) -> Kind:
        nowhere = np.full(d_sae, -1, np.int64)
        return cls(np.zeros(d_sae, np.int64), np.zeros(d_sae, np.float32), nowhere, nowhere.copy())

    def add(self, tokens: int, features: Tensor, values: Tensor, first: Tensor, second: Tensor) -> None:
        """The firings `[m]` on so many tokens, in their order."""
        self.tokens += tokens
        numbers, found = features.cpu().numpy(), values.cpu().numpy()
        self.fired += np.bincount(numbers, minlength=len(self.fired))
        order = np.lexsort((np.arange(len(numbers)), -found, numbers))
        best = order[np.diff(numbers[order], prepend=-1) != 0]
        best = best[found[best] > self.largest[numbers[best]]]
        own = numbers[best]
        self.largest[own], self.first[own], self.second[own] = (
            found[best],
            first.cpu().numpy()[best],
            second.cpu().numpy()[best],
        )

    @property
    def shares(self) -> np.ndarray:
        return self.fired / max(1, self.tokens)


def on_images(batches: Iterable[Batch], places: Sequence[int], d_sae: int) -> Kind:
    """On the tokens at these places, which are the images'. `first` is the image's id."""
    kind = Kind.of(d_sae)
    for batch in batches:
        found = batch.firings()
        of_image = torch.isin(found.places, torch.tensor(places, device=found.places.device))
        kept = of_image[found.tokens]
        tokens = found.tokens[kept]
        kind.add(int(of_image.sum()), found.features[kept], found.values[kept], found.documents[tokens], found.places[tokens])
    return kind


def on_texts(texts: Iterable[Tensor], d_sae: int) -> Kind:
    """On each token of the texts, each given as its features `[length, d_sae]`. `first` is the text's number."""
    kind = Kind.of(d_sae)
    for number, text in enumerate(texts):
        places, features = (text > 0).nonzero(as_tuple=True)
        kind.add(len(text), features, text[places, features], torch.full_like(places, number), places)
    return kind


def in_both(images: Kind, texts: Kind, densest: float) -> np.ndarray:
    """The features that fire on both, on no more than the share `densest` of the tokens of either: those first whose largest
    activations on both are most alike."""
    smaller, larger = np.minimum(images.largest, texts.largest), np.maximum(images.largest, texts.largest)
    chosen = np.flatnonzero((smaller > 0) & (np.maximum(images.shares, texts.shares) <= densest))
    return chosen[np.lexsort((chosen, -smaller[chosen] / larger[chosen]))]
