"""Features found by a direction, and by what they do to a next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.interpretation import attribution
from components.language_model.loading import kept_model, load_encoder
from components.run.checks import require_prompts
from components.run.specification import Specification
from components.settings import UserError
from components.steps.evaluation import own_sae
from components.steps.interpretation import decode_of, written_at


def search_direction(run: Specification, path: Path, limit: int) -> list[dict[str, Any]]:
    """Features whose decoder row points along a direction (a `.npy` of `d_in` numbers, such as a probe's weights), by `cosine`,
    nearest first."""
    _require_trained(run)
    try:
        direction = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--direction: '{path}' is no .npy file of numbers: {str(error).splitlines()[0]}") from error
    sae = written_at(run, own_sae(run.sae_url, torch.device("cpu")))
    width = sae.W_dec.shape[1]
    if not isinstance(direction, np.ndarray) or direction.dtype.kind not in "fiu" or direction.size != width:
        found = f"{getattr(direction, 'dtype', type(direction).__name__)} {list(getattr(direction, 'shape', ()))}"
        raise UserError(f"--direction: '{path}' holds {found}; {width} numbers are accepted")
    flat = torch.from_numpy(direction.astype(np.float32).ravel())
    if not bool(flat.isfinite().all()) or not bool(flat.any()):
        raise UserError(f"--direction: '{path}' holds no direction; finite numbers that are not all 0 are accepted")
    cosines = attribution.cosines(sae.W_dec, flat)
    best = cosines.argsort(descending=True, stable=True)[:limit].tolist()
    return [{"feature": feature, "cosine": float(f"{cosines[feature]:.4g}")} for feature in best]


def attribute(
    run: Specification, prompt: str, token: str, other: str | None, limit: int, ablate: bool, passes: int
) -> dict[str, Any]:
    """Features that after `prompt` bring the model to `token` rather than `other` (or the mean token), strongest first, see
    `attribution` for `passes`; with `ablate` also what each that fires really does, in that order, and how both agree."""
    require_prompts(run)
    _require_trained(run)
    encoder, decode = load_encoder(run.source), decode_of(run)
    target, against = _one(encoder, token, "--token"), None if other is None else _one(encoder, other, "--other")
    bos = [] if run.config.corpus.bos == "none" else [encoder.bos]
    ids = [*bos, *encoder.of(rendered=True)([prompt])[0]]
    room = run.model.longest_text or run.config.corpus.context_length
    if not len(bos) < len(ids) <= room:
        raise UserError(f"--prompt: {len(ids) - len(bos)} tokens are not accepted: 1 to {room - len(bos)} are")
    model, leave, reads = kept_model(run.source, run.device), len(bos), run.read_points
    sae = written_at(run, own_sae(run.sae_url, run.device))
    values, found = attribution.attribution(model, run.point, sae, ids, leave, target, against, run.device, reads, passes)
    firing = (found.amax(dim=0) > 0).nonzero()[:, 0]
    effects = torch.zeros(0)
    if ablate:
        effects = attribution.ablation(model, run.point, sae, ids, leave, target, against, firing.tolist(), run.device, reads)
    order = (effects if ablate else values[firing]).argsort(descending=True, stable=True)[:limit]
    rows = []
    for place in order.tolist():
        feature = int(firing[place])
        rows.append(
            {
                "feature": feature,
                "attribution": float(f"{values[feature]:.4g}"),
                "ablation": float(f"{effects[place]:.4g}") if ablate else None,
                "token": decode(ids[int(found[:, feature].argmax())]),
            }
        )
    agreement = attribution.spearman(values[firing], effects) if ablate else None
    return {"prompt": prompt, "firing": len(firing), "spearman": agreement, "features": rows}


def _one(encoder: Any, text: str, field: str) -> int:
    ids = list(encoder.of(rendered=True)([text])[0])
    if len(ids) != 1:
        raise UserError(f"{field}: {text!r} is {len(ids)} tokens of this model; one is accepted (a space may belong to it)")
    return int(ids[0])


def _require_trained(run: Specification) -> None:
    if run.training_record() is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not there yet; run `sae train` first")
