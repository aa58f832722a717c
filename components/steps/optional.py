"""What an evaluation measures only where it is asked for: probes, and the structure among the decoder's directions."""

from __future__ import annotations

import dataclasses
import logging

import torch

from components.corpus.labelled import read_labelled
from components.corpus.manifest import TokenManifest
from components.evaluation import passages, probing
from components.evaluation.absorption import absorption
from components.evaluation.difference import scalings, summarised
from components.evaluation.meta_structure import meta_structure
from components.evaluation.occurrences import read_occurrences
from components.evaluation.record import Metrics
from components.evaluation.results import Evaluation
from components.interop.coders import AnySAE, NormalizedSAE
from components.language_model.loading import kept_model, load_encoder, load_tokenizer
from components.run.coder import of_two_models
from components.run.specification import Specification
from components.sae.coder import Coder
from components.steps.reference import exclusion_of, held_out_of, reference_of

logger = logging.getLogger(__name__)


def with_optional(run: Specification, found: Evaluation, sae: AnySAE, token_manifest: TokenManifest) -> Evaluation:
    """The same evaluation with what `evaluation.probing` and the like ask for."""
    if run.config.evaluation.probing is not None:
        found = _probed(run, found, sae, token_manifest)
    if run.config.evaluation.absorption is not None:
        found = _with_absorption(run, found, sae, token_manifest)
    if of_two_models(run.reads, run.writes) and isinstance(sae, Coder):
        found = _with_difference(run, found, sae, token_manifest)
    structure = run.config.evaluation.meta_structure
    if structure is not None:
        living = torch.from_numpy(~found.features["dead"].to_numpy(zero_copy_only=False)).to(sae.W_dec.device)
        values = meta_structure(sae.W_dec[living], structure)
        found = dataclasses.replace(found, optional={**found.optional, "meta_structure": values})
    return found


def _probed(run: Specification, found: Evaluation, sae: AnySAE, token_manifest: TokenManifest) -> Evaluation:
    config, settings = run.config, run.config.evaluation.probing
    assert settings is not None
    reader, encoder = _reader(run, found, sae, token_manifest), load_encoder(run.source)
    bos = None if config.corpus.bos == "none" else encoder.bos
    length = min(settings.passage_tokens + (bos is not None), config.corpus.context_length)
    metrics: Metrics = {}
    rows = []
    for number, (task, listed) in enumerate(zip(settings.tasks, run.labelled, strict=True)):
        texts = passages.chosen_texts(
            read_labelled(task, number, listed), settings, f"evaluation.probing.tasks.{number} ({task.title})"
        )
        cut = passages.cut(texts, settings, encoder, bos, length)
        values, by_label = probing.probe(task.title, passages.read(reader, *cut, tuple(texts)), settings)
        metrics |= values
        rows += by_label
    return dataclasses.replace(
        found, optional={**found.optional, "probing": metrics}, breakdown={**found.breakdown, "probing": rows}
    )


def _with_absorption(run: Specification, found: Evaluation, sae: AnySAE, token_manifest: TokenManifest) -> Evaluation:
    settings = run.config.evaluation.absorption
    assert settings is not None
    if isinstance(sae, NormalizedSAE) or run.read_points:
        logger.warning("absorption: not measured, since the features do not add up to the activations that they are read from")
        return found
    text = held_out_of(run, token_manifest)
    reader = _reader(run, found, sae, token_manifest)
    seen = read_occurrences(reader, text, load_tokenizer(run.source), settings)
    decoder, bias = (part.detach().double().cpu().numpy() for part in (sae.W_dec, sae.b_dec))
    metrics, rows = absorption(seen, decoder, bias, settings)
    return dataclasses.replace(
        found, optional={**found.optional, "absorption": metrics}, breakdown={**found.breakdown, "absorption": rows}
    )


def _with_difference(run: Specification, found: Evaluation, coder: Coder, token_manifest: TokenManifest) -> Evaluation:
    text, model = held_out_of(run, token_manifest), kept_model(run.source, run.device)
    settings, exclusion = run.config.evaluation, exclusion_of(run, model, token_manifest)
    sums = scalings(
        coder, model, run.read_points, text, settings.tokens, exclusion, settings.batch_sequences, run.device
    )  # fmt: skip
    metrics, rows, features = summarised(sums.found(), found.features)
    return dataclasses.replace(
        found,
        optional={**found.optional, "difference": metrics},
        breakdown={**found.breakdown, "difference": rows},
        features=features,
    )


def _reader(run: Specification, found: Evaluation, sae: AnySAE, token_manifest: TokenManifest) -> passages.Reader:
    model, points = kept_model(run.source, run.device), run.read_points or (run.point,)
    means = [reference_of(run, model, token_manifest, point).mean for point in points]
    return passages.Reader(
        model=model,
        points=points,
        sae=sae,
        d_sae=sae.d_sae,
        mean=torch.cat(means),
        l0=max(1, round(found.metrics["l0"] or 0)),
        exclusion=exclusion_of(run, model, token_manifest),
        device=run.device,
        batch_sequences=run.config.evaluation.batch_sequences,
    )
