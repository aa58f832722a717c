"""Coder -> what its features fire on and do, as tables and as a browser."""

from __future__ import annotations

from typing import Any

from components import storage
from components.evaluation.held_out import HeldOut
from components.evaluation.record import About
from components.interpretation.browser import FOLDER, Decode, FeatureData, write_browser
from components.interpretation.feature_data import effects_of, find_examples, write_feature_data
from components.interpretation.record import InterpretationRecord, interpretation_url
from components.language_model.loading import kept_model, load_tokenizer
from components.run import identity
from components.run.specification import Specification
from components.settings import UserError
from components.steps.evaluation import exclusion_of, own_sae


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
        present = _feature_data(run, HeldOut(url=run.token_url, manifest=manifest), record.weights_sha256)
    _write_browser(run, measured.about)
    return present


def browser_address(run: Specification) -> str:
    return storage.join(run.sae_url, FOLDER, "index.html")


def _feature_data(run: Specification, text: HeldOut, weights_sha256: str) -> InterpretationRecord:
    settings, device = run.config.interpretation, run.device
    model, sae = kept_model(run.source, device), own_sae(run.sae_url, device)
    excluded = exclusion_of(run, model, text.manifest)
    size = run.config.evaluation.batch_sequences
    examples, tokens, sequences = find_examples(settings, sae, sae.d_sae, model, run.point, text, excluded, size, device)
    named = run.interpretation_identity(weights_sha256)
    record = InterpretationRecord(
        digest=identity.digest(named),
        identity=named,
        requested=settings.tokens,
        tokens=tokens,
        sequences=sequences,
        living=int((examples.firing > 0).sum()),
    )
    effects = effects_of(model, run.point, sae, settings.logits)
    write_feature_data(interpretation_url(run.sae_url), record, examples, text, effects)
    return record


def list_features(run: Specification, sort: str, search: str) -> list[dict[str, Any]]:
    """A row per feature that fires, as the browser's table has it, largest `sort` first."""
    keys = {"density": "density", "max_activation": "max", "mean_activation": "mean", "feature": "feature"}
    if sort not in keys:
        raise UserError(f"--sort: '{sort}' is not accepted: there are {', '.join(keys)}")
    data = _data(run)
    rows = [data.feature(feature)["row"] for feature in range(data.d_sae)]
    found = [row for row in rows if row["density"] > 0 and search.lower() in f"{row['tokens']} {row['logits']}".lower()]
    return sorted(found, key=lambda row: row[keys[sort]], reverse=sort != "feature")


def show_feature(run: Specification, feature: int) -> dict[str, Any]:
    """Examples, logits and neighbours of one feature, as plain JSON."""
    data = _data(run)
    if not 0 <= feature < data.d_sae:
        raise UserError(f"FEATURE: {feature} is not accepted: there are 0 to {data.d_sae - 1}")
    return data.feature(feature)


def _data(run: Specification) -> FeatureData:
    if run.interpretation_record() is None:
        raise UserError(f"sae: there is no feature data beside {run.sae_url} yet; run `sae features make`")
    return FeatureData(run.sae_url, _decode(run))


def _decode(run: Specification) -> Decode:
    tokenizer = load_tokenizer(run.source)
    return lambda token: str(tokenizer.decode([token]))


def _write_browser(run: Specification, about: About) -> None:
    write_browser(run.sae_url, about, _decode(run))
