"""Dead features that begin anew where the reconstruction is bad (Bricken et al. 2023, "Towards Monosemanticity", appendix)."""

from __future__ import annotations

import torch
from torch import Tensor

from components.sae.coder import Coder

ENCODER_SHARE = 0.2
"""Of the mean norm of living features' encoder columns: the norm of a new one."""


def is_due(coder: Coder, step: int, steps: int) -> bool:
    """Whether dead features begin anew after that step, counted from 1."""
    return any(step == max(1, round(share * steps)) for share in coder.settings.resample_at)


@torch.no_grad()
def resample(coder: Coder, optimizer: torch.optim.Optimizer, dead: Tensor, x: Tensor, y: Tensor, seed: int, step: int) -> None:
    """Each dead feature (bool `[d_sae]`) takes the direction of a token of the batch, x `[n, d_in]` and y `[n, d_out]`, drawn
    with a probability that grows with the square of its loss; its biases become zero and its optimizer state empty.

    Drawn on the CPU from seed and step: the same after a resume, and beside other coders. Where nothing is dead, or nothing
    lives whose norm could be taken, nothing changes.
    """
    places = dead.nonzero().flatten()
    living = (~dead).nonzero().flatten()
    if len(places) == 0 or len(living) == 0:
        return
    loss = (y - coder(x)).double().square().sum(dim=1)
    chances = loss.square().cpu()
    if not bool(chances.sum() > 0) or not bool(chances.isfinite().all()):
        return
    drawn = torch.multinomial(chances, len(places), replacement=True, generator=_generator(seed, step)).to(x.device)
    reads, writes = x[drawn], y[drawn] - coder.b_dec
    rows = coder.W_dec[living].norm(dim=1).mean() * torch.nn.functional.normalize(writes, dim=1)
    columns = ENCODER_SHARE * coder.W_enc[:, living].norm(dim=0).mean() * torch.nn.functional.normalize(reads, dim=1)
    coder.W_dec[places] = rows.to(coder.W_dec)
    coder.W_enc[:, places] = columns.T.to(coder.W_enc)
    for name in coder.encoder_biases:
        getattr(coder, name)[places] = 0.0
    for name, parameter in coder.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[parameter].get(key)
            if moment is None:
                continue
            if name == "W_enc":
                moment[:, places] = 0.0
            elif parameter.shape[0] == coder.d_sae and name not in ("b_dec", "W_skip"):
                moment[places] = 0.0


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
