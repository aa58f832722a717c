"""Which features bring a model to one next token rather than another (paper, "Attributions" and "Ablations").

The difference of their logits after a prompt: its gradient times what a feature adds says at once, to first order, what each
feature contributes; taking one away and running on says what it really does. What the coder does not reconstruct stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.evaluation.measurements import Autoencoder
from components.language_model.hook_points import HookPoint, capture_beside, logits_gradient, spliced_logits

_AT_ONCE = 32


def attribution(
    model: nn.Module,
    point: HookPoint,
    sae: Autoencoder,
    ids: Sequence[int],
    leave: int,
    target: int,
    other: int | None,
    device: torch.device,
    reads: Sequence[HookPoint] = (),
) -> tuple[Tensor, Tensor]:
    """`sum_t f_t (gradient_t . W_dec)` of each feature `[d_sae]`, and the features `[length, d_sae]` of the prompt's tokens.

    leave: first tokens whose features do not count (BOS). target, other: tokens; without `other` the logit of `target` less the
    mean of all. point: what the coder writes to; reads: what it reads, where that is not the same.
    """
    tokens = torch.tensor([list(ids)], device=device)
    _, gradient = logits_gradient(model, point, tokens, lambda logits: _difference(logits, target, other).sum())
    found = _features(model, reads or (point,), sae, tokens, leave)
    rows: Tensor = sae.W_dec  # type: ignore[attr-defined]
    along = gradient[0].to(rows.dtype) @ rows.detach().T  # [length, d_in] @ [d_in, d_sae]
    return (found.to(rows.dtype) * along).sum(dim=0).float().cpu(), found.cpu()


@torch.no_grad()
def ablation(
    model: nn.Module,
    point: HookPoint,
    sae: Autoencoder,
    ids: Sequence[int],
    leave: int,
    target: int,
    other: int | None,
    features: Sequence[int],
    device: torch.device,
    reads: Sequence[HookPoint] = (),
) -> Tensor:
    """By how much the difference falls when a feature is taken away on all tokens, `[len(features)]`."""
    tokens = torch.tensor([list(ids)], device=device)
    found = _features(model, reads or (point,), sae, tokens, leave)
    rows: Tensor = sae.W_dec.detach()  # type: ignore[attr-defined]
    before = _difference(spliced_logits(model, point, lambda _: None, tokens), target, other)
    effects = []
    for start in range(0, len(features), _AT_ONCE):
        chosen = torch.tensor(features[start : start + _AT_ONCE], device=device)
        # [length, b] and [b, d_in] -> [b, length, d_in]
        taken = torch.einsum("tb,bd->btd", found[:, chosen].to(rows.dtype), rows[chosen])

        def without(x: Tensor, taken: Tensor = taken) -> Tensor:
            return (x.to(taken.dtype) - taken).to(x.dtype)

        after = spliced_logits(model, point, without, tokens.expand(len(chosen), -1))
        effects.append(before - _difference(after, target, other))
    return torch.cat(effects).float().cpu() if effects else torch.zeros(0)


def spearman(first: Tensor, second: Tensor) -> float | None:
    """Rank correlation of two lists `[n]`; None where it is not defined."""
    from scipy.stats import spearmanr

    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return None
    return float(spearmanr(first.double().numpy(), second.double().numpy()).statistic)


def cosines(rows: Tensor, direction: Tensor) -> Tensor:
    """Of each decoder row `[d_sae, d_in]` with a direction `[d_in]`."""
    units = torch.nn.functional.normalize(rows.detach().float(), dim=1)
    return units @ torch.nn.functional.normalize(direction.to(units), dim=0)


@torch.no_grad()
def _features(model: nn.Module, reads: Sequence[HookPoint], sae: Autoencoder, tokens: Tensor, leave: int) -> Tensor:
    """Of one prompt `[1, length]`, `[length, d_sae]`."""
    x = capture_beside(model, reads, {"input_ids": tokens})[0]
    found, _ = sae.reconstruct(x.to(torch.promote_types(x.dtype, torch.float32)))
    dense = found.dense().float().clone()
    dense[:leave] = 0
    return dense


def _difference(logits: Tensor, target: int, other: int | None) -> Tensor:
    """`[batch, length, vocabulary]` -> `[batch]`, after the last token."""
    last = logits[:, -1].float()
    return last[:, target] - (last.mean(dim=1) if other is None else last[:, other])
