"""Token dataset -> activation dataset."""

from __future__ import annotations

from components.activations.dataset import extraction
from components.activations.dataset.manifest import Manifest
from components.run.specification import Specification
from components.settings import UserError
from components.steps.tokens import prepare_tokens


def extract(run: Specification) -> Manifest:
    """The activation dataset's manifest."""
    return extraction.extract(run.extraction(prepare_tokens(run)), run.device)


def require_dataset(run: Specification) -> Manifest:
    """The manifest of a dataset that is there; a UserError otherwise."""
    manifest = run.dataset_manifest()
    if manifest is None:
        raise UserError(f"activations: the dataset {run.dataset_url} is not there yet; run `sae extract` first")
    return manifest
