"""Matryoshka BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): the first features must do alone, too."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from components.sae.architectures.batchtopk import BatchTopKSAE, BatchTopKSettings
from components.sae.architectures.topk import with_auxk
from components.sae.coder import Losses, Progress, reconstruction_loss
from components.sae.settings import CoderSettings, FromTokens


class MatryoshkaSettings(FromTokens, BatchTopKSettings):
    version = 3  # of 2, decoder rows began random and of length 1, the bias at zero

    decides = (*BatchTopKSettings.decides, "levels")

    architecture: Literal["matryoshka"] = "matryoshka"  # type: ignore[assignment]
    """BatchTopK whose leading features also reconstruct without the rest (Bussmann et al. 2025)."""

    levels: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0), min_length=1)
    """Shares of the features, rising to 1, each of which reconstructs alone. Narrow ones hedge (arXiv 2505.11756)."""

    @field_validator("levels")
    @classmethod
    def _rise_to_one(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if list(levels) != sorted(set(levels)) or levels[0] <= 0 or levels[-1] != 1.0:
            raise ValueError(f"sae.levels: {list(levels)} is not accepted: shares over 0, rising, the last of them 1")
        return levels


class MatryoshkaSAE(BatchTopKSAE):
    """The loss is the mean over the levels of the reconstruction loss with the features up to that level alone."""

    Settings: ClassVar[type[CoderSettings]] = MatryoshkaSettings
    settings: MatryoshkaSettings

    def losses(self, x: Tensor, y: Tensor, progress: Progress) -> Losses:
        before, features = self._chosen(x, self.settings.k_at(progress))
        places = features.indices + self.first_feature
        y_hat = self.skipped(self.b_dec.expand(len(x), -1), x)
        nothing, low, losses = torch.zeros_like(self.b_dec), 0, []
        for share in self.settings.levels:
            high = max(low, round(share * self.features_of_all))
            here = features.values * ((places >= low) & (places < high))
            y_hat = y_hat + self.written(replace(features, values=here), self.W_dec, nothing)
            losses.append(reconstruction_loss(y, y_hat))
            low = high
        found = with_auxk(self, self.settings, x, before, features, y, y_hat, progress)
        # The last level is the whole reconstruction: its term is shown, and counted among the levels.
        weights = {**found.weights, "reconstruction": 0.0, "levels": 1.0}
        return Losses({**found.terms, "levels": torch.stack(losses).mean()}, weights, found.features)
