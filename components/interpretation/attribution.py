"""Which features bring a model to one next token rather than another (paper, "Attributions" and "Ablations").

The difference of their logits after a prompt: its gradient times what a feature adds says at once, to first order, what each
feature contributes; taking one away and running on says what it really does. What the coder does not reconstruct stays.

In between, the gradient half way to where a feature is taken away is right to second order (the midpoint rule of integrated
gradients, Sundararajan et al. 2017, along each feature's own ablation). One pass takes that step for several features at once,
half of them backwards, so that what they do to each other mostly cancels: a fixed number of passes for any number of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from components.evaluation.measurements import Autoencoder
from components.language_model.hook_points import HookPoint, capture_beside, logits_gradient, spliced_logits

_AT_ONCE = 32
PASSES = 32


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
    passes: int = 0,
) -> tuple[Tensor, Tensor]:
    """`sum_t f_t (gradient_t . W_dec)` of each feature `[d_sae]`, and the features `[length, d_sae]` of the prompt's tokens.

    passes: forward and backward, beside the first one, that look half way to the ablations; 0 for the gradient alone. With as
    many as there are firing features each has one of its own. leave: first tokens whose features do not count (BOS). target,
    other: tokens; without `other` the logit of `target` less the mean of all. point: what the coder writes to; reads: what it
    reads, where that is not the same.
    """
    tokens = torch.tensor([list(ids)], device=device)

    def gradients(less: Tensor | None, batch: int) -> Tensor:
        metric = logits_gradient(
            model, point, tokens.expand(batch, -1), lambda logits: _difference(logits, target, other).sum(), less
        )
        return metric[1].to(rows.dtype)

    found = _features(model, reads or (point,), sae, tokens, leave)
    rows: Tensor = sae.W_dec.detach()  # type: ignore[attr-defined]
    along = gradients(None, 1)[0] @ rows.T  # [length, d_in] @ [d_in, d_sae]
    values = (found.to(rows.dtype) * along).sum(dim=0)
    firing = (found.amax(dim=0) > 0).nonzero()[:, 0]
    if passes > 0 and len(firing) > 0:
        values[firing] = _half_way(values[firing], found[:, firing].to(rows.dtype), rows[firing], passes, gradients)
    return values.float().cpu(), found.cpu()


def _half_way(
    values: Tensor, found: Tensor, rows: Tensor, passes: int, gradients: Callable[[Tensor | None, int], Tensor]
) -> Tensor:
    """The gradient at `x - f W_dec / 2` along each feature, `[n]`. values `[n]`: along each at x; found `[length, n]`; rows
    `[n, d_in]`; gradients: of so many sequences with so much taken away, `[batch, length, d_in]`."""
    count = len(values)
    # Features of one place are dealt to different passes: they have most to do with each other.
    order = found.argmax(dim=0).argsort(stable=True)
    number = torch.empty_like(order)
    number[order] = torch.arange(count, device=order.device) % passes
    signs = torch.where(torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0).to(values)
    if passes >= count:
        signs = torch.ones_like(signs)
    there = torch.empty_like(values)
    for first in range(0, min(passes, count), _AT_ONCE):
        several = range(first, min(first + _AT_ONCE, passes, count))
        taken = torch.stack([(found * signs * (number == one)) @ rows for one in several]) / 2
        gradient = gradients(taken, len(several))
        for place, one in enumerate(several):
            own = (number == one).nonzero()[:, 0]
            there[own] = (found[:, own] * (gradient[place] @ rows[own].T)).sum(dim=0)
    # Where a feature went up in place of down, the change of the gradient is as large, and the other way.
    return values + signs * (there - values)


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
