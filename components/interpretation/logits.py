"""What a feature does to the next token by itself: its decoder row through the final norm and the unembedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from components.language_model.hook_points import HookPoint, within

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "embedding_norm")
_IN_STREAM = ("resid_pre", "resid_post", "attn_out", "mlp_out", "mixer_out")
_ENTRIES_AT_ONCE = 1 << 26


@torch.no_grad()
def logit_effects(model: nn.Module, point: HookPoint, rows: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Tokens that each row `[m, d_model]` makes most likely, and then those that it makes least likely, each strongest first:
    ids and effects `[m, 2 count]`. None where the hook point does not add to the residual stream, or the parts are not known.

    The direct effect alone (paper: "logit weights"): linear, up to the norm's own scale, without what later blocks do.
    """
    model, point = within(model, point)
    unembedding, norm = model.get_output_embeddings(), final_norm(model)  # type: ignore[operator]
    if point.tower or point.kind not in _IN_STREAM or norm is None or not isinstance(unembedding, nn.Linear):
        return None
    written = _through(norm, rows.to(unembedding.weight))
    size = max(1, _ENTRIES_AT_ONCE // unembedding.out_features)
    ids, effects = [], []
    for block in written.split(size):
        logits = torch.nn.functional.linear(block, unembedding.weight).float()
        for sign in (1, -1):
            best = (sign * logits).topk(min(count, logits.shape[1]), dim=1)
            ids.append(best.indices)
            effects.append(sign * best.values)
    return _joined(ids), _joined(effects)


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm between the last block and the unembedding."""
    for parent in _parents(model):
        for name in _FINAL_NORMS:
            found = getattr(parent, name, None)
            if isinstance(found, nn.Module):
                return found
    return None


def _parents(model: nn.Module) -> Iterator[nn.Module]:
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    for parent in (base, getattr(base, "decoder", None), getattr(base, "language_model", None)):
        if isinstance(parent, nn.Module):
            yield parent


def _through(norm: nn.Module, rows: Tensor) -> Tensor:
    """The linear part of the norm on rows `[m, d]`, without its division by the length.

    A vector of +1 and -1 has mean 0 and length 1 per dimension: what comes out is the gain, whatever the norm calls it.
    """
    probe = torch.ones_like(rows[0])
    probe[1::2] = -1
    gain = (norm(probe) - norm(-probe)) / 2 / probe
    centred = rows - rows.mean(dim=1, keepdim=True) if isinstance(norm, nn.LayerNorm) else rows
    return centred * gain


def _joined(parts: list[Tensor]) -> Tensor:
    """Blocks of the most likely and of the least likely in turn -> side by side."""
    return torch.cat([torch.cat(parts[0::2]), torch.cat(parts[1::2])], dim=1)
