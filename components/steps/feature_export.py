"""Feature data -> the folders of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.interpretation.exports import delphi, feature_json, neuronpedia, neuronpedia_tree
from components.run.checks import require_text
from components.run.specification import Specification
from components.settings import UserError
from components.steps.interpretation import feature_data, held_out_pass
from components.steps.reference import held_out_of

FORMATS = ("neuronpedia", "neuronpedia-tree", "feature-json", "delphi")
_CREATOR, _CREATED = "sae-foundry", "2026-01-01T00:00:00.000Z"
"""Of the tree's lines, for whoever imports it to change: the same data gives the same bytes."""
_SITES = {"resid_pre": "res-pre", "resid_post": "res", "mlp_out": "mlp", "attn_out": "att"}


def export_features(run: Specification, format: str, folder: Path, source_set: str | None) -> dict[str, Any]:
    """The feature data of a run in another project's format, in a new folder. source_set: Neuronpedia's name of it."""
    if format not in FORMATS:
        raise UserError(f"--format: '{format}' is not accepted: there are {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"DIR: '{folder}' is not accepted: it is there already; a new or empty folder is")
    require_text(run, "these formats hold")
    data = feature_data(run)
    folder.mkdir(parents=True, exist_ok=True)
    layer = run.point.layer or 0
    every = range(data.d_sae)
    name = neuronpedia.identifier(source_set or f"{_SITES.get(run.point.kind, 'sae')}-{run.config.name}")
    match format:
        case "neuronpedia-tree":
            release = _release(run, layer, name)
            features = (data.feature(feature, neuronpedia.WINDOW) for feature in every)
            count = neuronpedia_tree.write(folder, features, release)
            named = {"modelId": release.model_id, "source": release.source}
            return {"format": format, "folder": str(folder), "features": count, **named}
        case "neuronpedia":
            model, source = neuronpedia.identifier(run.model.slug), f"{layer}-{name}"
            features = (data.feature(feature, neuronpedia.WINDOW) for feature in every)
            count = neuronpedia.write(folder, features, model, source)
            return {"format": format, "folder": str(folder), "features": count, "modelId": model, "source": source}
        case "feature-json":
            features = (data.feature(feature, feature_json.WINDOW) for feature in every)
            count = feature_json.write(folder, features, layer, f"{run.config.name}-{run.sae_digest}")
            return {"format": format, "folder": str(folder), "features": count, "layer": layer}
    manifest = run.token_manifest()
    assert manifest is not None
    held_out = held_out_pass(run, held_out_of(run, manifest))
    count = delphi.write(folder, held_out, run.point, run.source.location, run.config.corpus.title)
    return {"format": format, "folder": str(folder), "activations": count, "hookpoint": delphi.hookpoint(run.point)}


def _release(run: Specification, layer: int, name: str) -> neuronpedia_tree.Release:
    record, manifest = run.interpretation_record(), run.token_manifest()
    assert record is not None
    assert manifest is not None
    return neuronpedia_tree.Release(
        model_id=neuronpedia.identifier(run.model.slug),
        set_name=name,
        layer=layer,
        layers=run.model.layers,
        kind=run.point.kind,
        model_name=run.config.language_model.name,
        dataset=run.config.corpus.title,
        sequences=record.sequences,
        context_length=manifest.context_length,
        creator=_CREATOR,
        created=_CREATED,
    )
