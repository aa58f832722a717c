"""Features that fire on a text, or on some texts rather than others (paper, "Searching for specific features")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from components.evaluation.measurements import Autoencoder
from components.language_model.hook_points import HookPoint, capture_beside


@torch.no_grad()
def firing(
    model: nn.Module,
    points: Sequence[HookPoint],
    sae: Autoencoder,
    texts: Sequence[Sequence[int]],
    bos: int | None,
    device: torch.device,
) -> list[Tensor]:
    """For each text, given as token ids, the features of its tokens, `[length, d_sae]`; of a token that stands for the
    beginning of a sequence none."""
    found = []
    for ids in texts:
        begun = [*([] if bos is None else [bos]), *ids]
        x = capture_beside(model, points, {"input_ids": torch.tensor([begun], device=device)})[0]
        features, _ = sae.reconstruct(x[len(begun) - len(ids) :].to(torch.promote_types(x.dtype, torch.float32)))
        found.append(features.dense().float().cpu())
    return found


@torch.no_grad()
def largest(
    model: nn.Module,
    points: Sequence[HookPoint],
    sae: Autoencoder,
    texts: Sequence[Sequence[int]],
    bos: int | None,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the largest activation of each feature, float32 `[n, d_sae]`, and the token that has it, int32."""
    values, places = [], []
    for ids in texts:
        (found,) = firing(model, points, sae, [ids], bos, device)
        values.append(found.amax(dim=0).numpy())
        places.append(found.argmax(dim=0).to(torch.int32).numpy())
    return np.stack(values), np.stack(places)


def contrast(texts: Sequence[Tensor], against: Sequence[Tensor]) -> Tensor:
    """How much stronger each feature fires in `texts`, `[d_sae]`: the mean over texts of its largest activation, less the
    same of the others, which may be none."""
    there = torch.stack([text.amax(dim=0) for text in texts]).mean(dim=0)
    return there - torch.stack([text.amax(dim=0) for text in against]).mean(dim=0) if against else there
