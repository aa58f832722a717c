"""What the steps that look at a coder in its language model take from training text."""

from __future__ import annotations

from torch import nn

from components.activations.dataset.forward import resolve_exclusion
from components.activations.exclusion import Exclusion
from components.corpus.manifest import TokenManifest
from components.evaluation import evaluate as evaluation
from components.evaluation.held_out import HeldOut, Images
from components.language_model.hook_points import HookPoint
from components.run.specification import Specification


def held_out_of(run: Specification, token_manifest: TokenManifest) -> HeldOut:
    """The held-out sequences of this configuration's corpus, and how its model takes them."""
    # The source without what is cached: this goes to other processes.
    images = Images(run.model.source, run.model.layout()) if run.of_images else None
    return HeldOut(url=run.token_url, manifest=token_manifest, images=images)


def exclusion_of(run: Specification, model: nn.Module, token_manifest: TokenManifest) -> Exclusion:
    """Tokens that do not count, of this configuration."""
    return resolve_exclusion(
        run.config.activations.exclude, run.source, model, [run.point, *run.read_points], run.token_url, token_manifest,
        run.device,
    )  # fmt: skip


def reference_of(run: Specification, model: nn.Module, token_manifest: TokenManifest, point: HookPoint) -> evaluation.Reference:
    """What this configuration's evaluations take from training text at a hook point."""
    settings, text = run.config.evaluation, held_out_of(run, token_manifest)
    excluded = exclusion_of(run, model, token_manifest)
    return evaluation.reference_statistics(
        model, point, text, settings.reference_tokens, settings.batch_sequences, run.device, excluded
    )
