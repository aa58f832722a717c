"""Corpus -> token dataset."""

from __future__ import annotations

from typing import Any

from components.corpus import images, tokens
from components.corpus.manifest import TokenManifest
from components.language_model.loading import load_encoder
from components.run.specification import Specification


def prepare_tokens(run: Specification) -> TokenManifest:
    """The token dataset's manifest; made of the files that the specification lists, and of no other."""
    present = run.token_manifest()
    if present is not None:
        return present
    config, url = run.config, run.token_url
    named: dict[str, Any] = {"digest": run.token_digest, "identity": run.token_identity}
    if run.of_images:
        files = run.sources[0].files
        return images.prepare_images(config.corpus, files, run.model.layout(), config.seed, url, **named)
    return tokens.prepare_tokens(config.corpus, load_encoder(run.source), config.seed, url, **named, sources=run.sources)
