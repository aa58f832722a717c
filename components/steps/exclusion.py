"""Tokens that do not count, in numbers, for the steps that look at a coder in its language model."""

from __future__ import annotations

from torch import nn

from components.activations.dataset.forward import resolve_exclusion
from components.activations.exclusion import Exclusion
from components.corpus.manifest import TokenManifest
from components.run.specification import Specification


def exclusion_of(run: Specification, model: nn.Module, token_manifest: TokenManifest) -> Exclusion:
    """Tokens that do not count, of this configuration."""
    return resolve_exclusion(
        run.config.activations.exclude, run.source, model, [run.point, *run.read_points], run.token_url, token_manifest,
        run.device,
    )  # fmt: skip
