"""Token dataset -> activation dataset."""

from __future__ import annotations

from components.activations.dataset import extraction
from components.activations.dataset.job import Extraction
from components.activations.dataset.manifest import Manifest
from components.activations.online.folder import OnlineFolder
from components.corpus.manifest import TokenManifest
from components.run.online import generation, production_of
from components.run.specification import Specification
from components.settings import UserError
from components.steps.tokens import prepare_tokens


def extract(run: Specification) -> Manifest:
    """The activation dataset's manifest; where activations are made online, that of the first generation, which says by what
    all are scaled."""
    known = run.dataset_manifest() if run.config.activations.mode == "online" else None
    if known is not None:
        return known
    tokens = prepare_tokens(run)
    return extracted(run, tokens, extraction.extract(extraction_of(run, tokens), run.device))


def extraction_of(run: Specification, tokens: TokenManifest) -> Extraction:
    """What is there before training begins."""
    return run.extraction(tokens) if run.config.activations.mode == "stored" else generation(run, tokens, 0)


def extracted(run: Specification, tokens: TokenManifest, manifest: Manifest) -> Manifest:
    """To be called with what `extraction_of` came to."""
    if run.config.activations.mode == "online":
        folder = OnlineFolder(run.dataset_url)
        folder.begin(production_of(run, tokens).count, run.config.activations.generations_mixed or 1)
        folder.enter(0, manifest)
    return manifest


def require_dataset(run: Specification) -> Manifest:
    """The manifest of a dataset that is there; a UserError otherwise."""
    manifest = run.dataset_manifest()
    if manifest is None:
        raise UserError(f"activations: the dataset {run.dataset_url} is not there yet; run `sae extract` first")
    return manifest
