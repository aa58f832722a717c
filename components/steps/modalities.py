"""Coder of a model that sees -> which of its features fire on pictures of one's own, and on images and on text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.corpus import tokens as corpus
from components.corpus.images import size_of
from components.corpus.tokens import SPECIAL
from components.interpretation import modalities, search
from components.interpretation.pictures import Pictures
from components.interpretation.prompt_sets import load_harmless
from components.language_model.hook_points import capture_beside
from components.language_model.loading import forward_inputs, kept_model
from components.run.specification import Specification
from components.settings import UserError
from components.steps.evaluation import own_sae
from components.steps.interpretation import decode_of, held_out_pass, token_ids
from components.steps.reference import held_out_of


def search_pictures(run: Specification, pictures: Sequence[Path], against: Sequence[Path], limit: int) -> list[dict[str, Any]]:
    """As `search_features`, of pictures in place of texts; `patches` are row and column (or the place in the sequence, for what
    is no part of the picture) where a feature fires most in each picture in which it does."""
    if not run.of_images:
        raise UserError(f"--image: the SAE reads '{run.config.corpus.source}'; accepted is one whose corpus is images")
    if run.training_record() is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not there yet; run `sae train` first")
    layout, model, sae = run.model.layout(), kept_model(run.source, run.device), own_sae(run.sae_url, run.device)
    counted = np.array(layout.counted)
    places = np.flatnonzero(counted).tolist()

    @torch.no_grad()
    def firing(file: Path) -> Tensor:
        """Of the tokens that count, `[n, d_sae]`."""
        content = file.read_bytes() if file.is_file() else b""
        if size_of(content) is None:
            raise UserError(f"--image: '{file}' cannot be read as an image")
        row = corpus.Sequences(
            tokens=np.array([layout.tokens]), documents=np.where(counted, 0, SPECIAL)[None],
            positions=np.array([layout.positions]), images=(content,),
        )  # fmt: skip
        x = capture_beside(model, run.read_points or (run.point,), forward_inputs(run.source, row, run.device))[0, counted]
        return sae.encode(x.to(torch.promote_types(x.dtype, torch.float32))).dense().float().cpu()

    ours, theirs = [firing(one) for one in pictures], [firing(one) for one in against]
    difference, rows = search.contrast(ours, theirs), []
    for feature in difference.argsort(descending=True, stable=True)[:limit].tolist():
        if difference[feature] <= 0:
            break
        peaks = [places[int(one[:, feature].argmax())] for one in ours if one[:, feature].max() > 0]
        rows.append(
            {
                "feature": feature,
                "difference": float(f"{difference[feature]:.4g}"),
                "pictures": len(peaks),
                "against": sum(bool(one[:, feature].max() > 0) for one in theirs),
                "patches": [layout.patch(place) or place for place in peaks],
            }
        )
    return rows


def multimodal(run: Specification, texts: Sequence[str], densest: float, limit: int) -> dict[str, Any]:
    """Features that fire on the tokens of held-out images and on those of texts (harmless ones that ship, where none are
    given), on at most the share `densest` of either: `alike`, the smaller by the larger of the largest activations on both,
    and per kind the share of tokens, the largest activation and where that is."""
    if not run.of_images or not run.model.layout().of_text:
        raise UserError(
            "corpus.prompt: features that fire on images and on text are those of a vision-language model's decoder, which "
            "reads images of the corpus with a prompt; give corpus.source 'images' and a prompt"
        )
    manifest = run.token_manifest()
    if run.interpretation_record() is None or manifest is None:
        raise UserError(f"sae: there is no feature data beside {run.sae_url} yet; run `sae features make`")
    some = list(texts) or list(load_harmless().texts)
    ids, decode, layout = token_ids(run, some, "--texts"), decode_of(run), run.model.layout()
    held_out = held_out_pass(run, held_out_of(run, manifest))
    firing = (search.firing(held_out.model, held_out.points, held_out.sae, [one], run.bos, run.device)[0] for one in ids)
    of_text = modalities.on_texts(firing, held_out.d_sae)
    of_images = modalities.on_images(held_out.batches(), layout.places, held_out.d_sae)
    pictures, rows = Pictures(run.sae_url, layout), []
    for feature in modalities.in_both(of_images, of_text, densest)[:limit].tolist():
        image, place = int(of_images.first[feature]), int(of_images.second[feature])
        text, token = int(of_text.first[feature]), int(of_text.second[feature])
        largest = float(of_images.largest[feature]), float(of_text.largest[feature])
        rows.append(
            {
                "feature": feature,
                "alike": float(f"{min(largest) / max(largest):.4g}"),
                "images": {
                    "share": float(of_images.shares[feature]), "largest": float(f"{largest[0]:.4g}"), "image": image,
                    "patch": pictures.patch(place), "where": pictures.where(image, place),
                },
                "texts": {
                    "share": float(of_text.shares[feature]), "largest": float(f"{largest[1]:.4g}"), "text": text,
                    "place": token, "token": decode(ids[text][token]),
                },
            }
        )  # fmt: skip
    either = int(((of_images.fired > 0) | (of_text.fired > 0)).sum())
    both = int(((of_images.fired > 0) & (of_text.fired > 0)).sum())
    counted = {"image_tokens": of_images.tokens, "text_tokens": of_text.tokens, "firing": either, "on_both": both}
    return {**counted, "densest": densest, "features": rows}
