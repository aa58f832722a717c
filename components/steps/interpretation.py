"""Coder -> what its features fire on and do, as tables and as a browser."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from components import storage
from components.activations.exclusion import Exclusion
from components.evaluation.columns import OneColumn
from components.evaluation.held_out import HeldOut
from components.evaluation.job import Span, spans
from components.evaluation.kept import parts
from components.interop.coders import AnySAE
from components.interpretation import search
from components.interpretation.activations import Pass, at_once
from components.interpretation.browser import FOLDER, write_browser
from components.interpretation.described import Decode, FeatureData
from components.interpretation.explanations.table import read_explanations
from components.interpretation.feature_data import effects_of, write_feature_data
from components.interpretation.history import read_history
from components.interpretation.job import InterpretationJob
from components.interpretation.layout import layout
from components.interpretation.matches import read_matches
from components.interpretation.pictures import Pictures
from components.interpretation.record import InterpretationRecord, interpretation_url
from components.interpretation.seen import Seen, include_span, keep_span
from components.language_model.loading import LOADING, kept_model, load_encoder, load_tokenizer
from components.run import identity
from components.run.checks import require_prompts, require_text
from components.run.specification import Specification
from components.sae.coder import Coder
from components.settings import UserError
from components.steps.evaluation import own_sae
from components.steps.matches import carry_over, match_with_champion
from components.steps.reference import exclusion_of, held_out_of


def interpret(run: Specification) -> InterpretationRecord | None:
    """The record of the feature data beside the evaluated coder, with its browser; None where the configuration wants none."""
    settings = run.config.interpretation
    if settings.tokens == 0:
        return None
    record, measured, manifest = run.training_record(), run.evaluation_record(), run.token_manifest()
    if record is None or measured is None or manifest is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not trained and evaluated yet; run `sae evaluate` first")
    present = run.interpretation_record()
    if present is not None and storage.exists(browser_address(run)):
        return present
    if present is None:
        storage.delete(browser_address(run))  # of other data: whoever is killed in between finds no page
        present = _feature_tables(run, held_out_of(run, manifest), record.weights_sha256)
    matches = match_with_champion(run, record.weights_sha256)
    carry_over(run, record.weights_sha256, matches)
    refresh_browser(run)
    storage.delete(run.kept_spans_url(present.digest))
    return present


def refresh_browser(run: Specification) -> None:
    """Write the browser with all that is known by now."""
    measured = run.evaluation_record()
    assert measured is not None
    write_browser(run.sae_url, measured.about, feature_data(run))


def browser_address(run: Specification) -> str:
    return storage.join(run.sae_url, FOLDER, "index.html")


def interpretation_job(run: Specification) -> InterpretationJob | None:
    """What there is to look at, for workers that may be elsewhere; None where nothing is left of it."""
    record, manifest, wanted = run.training_record(), run.token_manifest(), run.config.interpretation.tokens > 0
    if not wanted or record is None or manifest is None or run.evaluation_record() is None or run.interpretation_record():
        return None
    return _job(run, held_out_of(run, manifest), record.weights_sha256)


def interpretation_exclusion(run: Specification) -> Exclusion:
    """Tokens that do not count, once for all spans."""
    manifest = run.token_manifest()
    assert manifest is not None
    return exclusion_of(run, kept_model(run.source, run.device), manifest)


def look_at_span(job: InterpretationJob, exclusion: Exclusion, device: torch.device, span: Span) -> None:
    """What the features do on a span of held-out text, kept for `interpret`."""
    keep_span(job.kept_url, span, partial(_seen, job, exclusion, device, span))


def _seen(job: InterpretationJob, exclusion: Exclusion, device: torch.device, span: Span, earlier: Seen | None = None) -> Seen:
    with LOADING:  # the coder too: torch's default type is another meanwhile
        sae, model = own_sae(job.sae_url, device), kept_model(job.source, device)
    text = dataclasses.replace(job.text, sequences=span.sequences)
    held_out = Pass(
        sae=sae, d_sae=sae.d_sae, model=model, points=job.points, text=text, tokens=span.tokens, exclusion=exclusion,
        device=device,
    )  # fmt: skip
    seen = Seen(job.settings, sae.d_sae, text.manifest.context_length, device, earlier)
    for batch in held_out.batches():
        seen.add(batch)
    return seen


def _job(run: Specification, text: HeldOut, weights_sha256: str) -> InterpretationJob:
    settings, workers = run.config.interpretation, run.config.execution.workers
    return InterpretationJob(
        settings=settings,
        source=run.model.source,  # without what is cached
        points=run.read_points or (run.point,),
        text=text,
        sae_url=run.sae_url,
        kept_url=run.kept_spans_url(identity.digest(run.interpretation_identity(weights_sha256))),
        spans=tuple(spans(text, settings.tokens, at_once(text, run.d_sae), parts(settings.tokens, workers))),
    )


def _feature_tables(run: Specification, text: HeldOut, weights_sha256: str) -> InterpretationRecord:
    """Over all spans, of which those that are kept are not looked at again. Memory: of two of them."""
    settings, device, job = run.config.interpretation, run.device, _job(run, text, weights_sha256)
    model, sae = kept_model(run.source, device), own_sae(run.sae_url, device)
    exclusion = exclusion_of(run, model, text.manifest)
    seen = Seen(settings, sae.d_sae, text.manifest.context_length, torch.device("cpu"))
    for span in job.spans:
        include_span(job.kept_url, span, seen, partial(_seen, job, exclusion, device, span, seen))
    named = run.interpretation_identity(weights_sha256)
    record = InterpretationRecord(
        digest=identity.digest(named),
        identity=named,
        requested=settings.tokens,
        tokens=seen.tokens,
        sequences=seen.sequences,
        living=int((seen.examples.firing > 0).sum()),
    )
    effects, rows = effects_of(model, run.point, written_at(run, sae), settings.logits), getattr(sae, "W_dec", None)
    places = None if rows is None else layout(rows.detach(), seen.examples.firing > 0)
    write_feature_data(interpretation_url(run.sae_url), record, seen, settings, text, effects, places)
    return record


def written_at(run: Specification, sae: AnySAE) -> AnySAE | OneColumn:
    """The coder, as far as it writes to `run.point`."""
    return OneColumn(sae, -1) if len(run.writes) > 1 and isinstance(sae, Coder) else sae


def held_out_pass(run: Specification, text: HeldOut) -> Pass:
    """Of the trained coder over the tokens that its features are looked at on."""
    device, model = run.device, kept_model(run.source, run.device)
    sae = own_sae(run.sae_url, device)
    return Pass(
        sae=sae,
        d_sae=sae.d_sae,
        model=model,
        points=run.read_points or (run.point,),
        text=text,
        tokens=run.config.interpretation.tokens,
        exclusion=exclusion_of(run, model, text.manifest),
        device=device,
    )


def list_features(run: Specification, sort: str, wanted: str) -> list[dict[str, Any]]:
    """A row per feature that fires, as the browser's table has it, largest `sort` first. `one_token`: the share of its random
    sample over all strengths that is on one token, in a column of its own."""
    keys = {
        "density": "density",
        "max_activation": "max",
        "mean_activation": "mean",
        "feature": "feature",
        "one_token": "one_token",
    }
    if sort not in keys:
        raise UserError(f"--sort: '{sort}' is not accepted: there are {', '.join(keys)}")
    if sort == "one_token" and run.of_images:
        require_text(run, "--sort: one_token is of")
    data = feature_data(run)
    found = []
    for feature in range(data.d_sae):
        known = data.feature(feature)
        row = known["row"]
        if row["density"] == 0 or wanted.lower() not in f"{row['tokens']} {row['logits']} {row['explanation']}".lower():
            continue
        if sort == "one_token":
            row["one_token"] = _on_one_token(known["examples"])
        found.append(row)
    if sort == "feature":
        return sorted(found, key=lambda row: row["feature"])
    return sorted(found, key=lambda row: (row[keys[sort]], row["density"]), reverse=True)


def _on_one_token(examples: list[dict[str, Any]]) -> float:
    sample = [one["tokens"][one["peak"]].strip() or one["tokens"][one["peak"]] for one in examples if one["kind"] == "sample"]
    return max(map(sample.count, sample)) / len(sample) if len(sample) > 1 else 0.0


def show_feature(run: Specification, feature: int) -> dict[str, Any]:
    """Examples, logits and neighbours of one feature, as plain JSON."""
    data = feature_data(run)
    if not 0 <= feature < data.d_sae:
        raise UserError(f"FEATURE: {feature} is not accepted: there are 0 to {data.d_sae - 1}")
    return data.feature(feature)


def search_features(run: Specification, texts: list[str], against: list[str], limit: int) -> list[dict[str, Any]]:
    """Features that fire on these texts more than on the others (where there are some), the most telling first: `difference` of
    the mean largest activations, in how many `texts` and `against` each fires, and the token of each text on which it does
    most. They need no feature data."""
    require_prompts(run)
    if run.training_record() is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not there yet; run `sae train` first")
    ids, decode = token_ids(run, [*texts, *against], "--text"), decode_of(run)
    model, sae = kept_model(run.source, run.device), own_sae(run.sae_url, run.device)
    found = search.firing(model, run.read_points or (run.point,), sae, ids, run.bos, run.device)
    ours, theirs = found[: len(texts)], found[len(texts) :]
    difference = search.contrast(ours, theirs)
    rows = []
    for feature in difference.argsort(descending=True, stable=True)[:limit].tolist():
        if difference[feature] <= 0:
            break
        firing = [(text[:, feature], tokens) for text, tokens in zip(ours, ids, strict=False) if text[:, feature].max() > 0]
        rows.append(
            {
                "feature": feature,
                "difference": float(f"{difference[feature]:.4g}"),
                "texts": len(firing),
                "against": sum(bool(text[:, feature].max() > 0) for text in theirs),
                "tokens": [decode(tokens[int(activations.argmax())]) for activations, tokens in firing],
            }
        )
    return rows


def token_ids(run: Specification, texts: Sequence[str], field: str) -> list[list[int]]:
    """Of each text, without BOS and no more than the model was looked at with; a UserError that names `field` for none."""
    encoder = load_encoder(run.source)
    ids = [list(found)[: run.config.corpus.context_length - 1] for found in encoder.of(rendered=True)(list(texts))]
    for text, tokens in zip(texts, ids, strict=True):
        if not tokens:
            raise UserError(f"{field}: {text!r} holds no token")
    return ids


def feature_data(run: Specification) -> FeatureData:
    """What is known of the trained coder's features; a UserError where nothing is yet."""
    if run.interpretation_record() is None:
        raise UserError(f"sae: there is no feature data beside {run.sae_url} yet; run `sae features make`")
    record = run.training_record()
    assert record is not None
    matches = read_matches(run.sae_url, record.weights_sha256)
    said = read_explanations(run.sae_url, record.weights_sha256)
    earlier = read_history(storage.join(run.config.storage.root, "saes"), run.sae_url, matches)
    pictures = Pictures(run.sae_url, run.model.layout()) if run.of_images else None
    return FeatureData(run.sae_url, decode_of(run), matches, said, earlier, pictures)


def decode_of(run: Specification) -> Decode:
    """The text of one token; a model that reads images alone has none, and needs no tokenizer."""
    if run.of_images and not run.model.layout().of_text:
        return lambda _: ""
    tokenizer = load_tokenizer(run.source)
    return lambda token: str(tokenizer.decode([token]))
