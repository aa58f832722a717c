"""Features that fire on a text, or on some texts rather than others (paper, "Searching for specific features")."""

from __future__ import annotations

from collections.abc import Sequence

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


def contrast(texts: Sequence[Tensor], against: Sequence[Tensor]) -> Tensor:
    """How much stronger each feature fires in `texts`, `[d_sae]`: the mean over texts of its largest activation, less the
    same of the others, which may be none."""
    there = torch.stack([text.amax(dim=0) for text in texts]).mean(dim=0)
    return there - torch.stack([text.amax(dim=0) for text in against]).mean(dim=0) if against else there
