"""Steering: features held, scaled or added while the language model reads and writes (paper, "Influence on Behavior")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.evaluation.measurements import Autoencoder
from components.language_model.hook_points import HookPoint, capture, hooked, spliced_logits, within
from components.settings import UserError

Replace = Callable[[Tensor, Tensor], Tensor | None]
"""What a coder reads `[batch, length, d_in]` and what it writes to `[batch, length, d_out]` -> another in place of the second,
or None to leave it."""
Where = Callable[[Tensor], Tensor]
"""Positions in the sequence, int64 `[length]` -> which of them are steered, bool `[length]`."""
Kind = Literal["clamp", "scale", "add"]


@dataclass(frozen=True)
class Edit:
    feature: int
    value: float
    kind: Kind = "clamp"
    """`clamp`: the feature is `value`, 0 takes it away; `scale`: it is so many times what it was; `add`: so much more, whatever
    it was."""


def edited(
    sae: Autoencoder,
    edits: Sequence[Edit],
    where: Where | None = None,
    first: Callable[[], int] = lambda: 0,
    longest: float | None = None,
) -> Replace:
    """What the coder does not reconstruct stays (the paper's error term): only `(new - f) W_dec` is added. where: all
    positions where it is not given. first: the position of the first token of a pass. longest: tokens of a larger norm are left
    alone: on an attention sink, which no coder with a mask was trained on, f means nothing and may be thousands."""
    rows: Tensor = sae.W_dec[[edit.feature for edit in edits]]  # type: ignore[attr-defined]

    def replace(x: Tensor, y: Tensor) -> Tensor:
        if all(edit.kind == "add" for edit in edits):
            change = torch.tensor([edit.value for edit in edits]).to(rows).expand(*y.shape[:-1], -1)
        else:
            features, _ = sae.reconstruct(x.reshape(-1, x.shape[-1]).to(rows.dtype))
            now = features.dense()[:, [edit.feature for edit in edits]].to(rows.dtype)
            change = torch.stack([_change(edit, now[:, place]) for place, edit in enumerate(edits)], dim=1)
            change = change.reshape(*y.shape[:-1], len(edits))
        if where is not None:
            positions = torch.arange(y.shape[1], device=y.device) + first()
            change = change * where(positions)[None, :, None]
        if longest is not None:
            change = change * (x.norm(dim=-1, keepdim=True) <= longest)
        return (y.to(rows.dtype) + change @ rows).to(y.dtype)

    return replace


def _change(edit: Edit, now: Tensor) -> Tensor:
    if edit.kind == "clamp":
        return edit.value - now
    return (edit.value - 1) * now if edit.kind == "scale" else torch.full_like(now, edit.value)


def clamped(sae: Autoencoder, feature: int, value: float) -> Replace:
    """The feature at `value` on every token."""
    return edited(sae, [Edit(feature, value)])


@contextmanager
def steered(
    model: nn.Module,
    point: HookPoint,
    sae: Autoencoder,
    edits: Sequence[Edit],
    where: Where | None = None,
    reads: Sequence[HookPoint] = (),
) -> Iterator[None]:
    """While open, every forward pass of the model has the edits, those of `generate` with its cache among them.

        with steered(model, point, sae, [Edit(123, 5 * largest)]):
            model.generate(...)

    where: of the positions in the whole sequence, also where a cache holds the first ones.
    """
    if any(within(model, one)[0] is not model for one in (point, *reads)):
        raise UserError("sae: between two models a feature is steered by `sae features steer` alone")
    first, batch = 0, 1

    def begun(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal first, batch
        entered = given[0] if given else named.get("input_ids", named.get("inputs_embeds"))
        past = named.get("past_key_values")
        first, batch = 0 if past is None else int(past.get_seq_length()), 1 if entered is None else len(entered)

    handle = model.register_forward_pre_hook(begun, with_kwargs=True)
    try:
        with replaced(model, point, edited(sae, edits, where, lambda: first), lambda: batch, reads):
            yield
    finally:
        handle.remove()


@contextmanager
def replaced(
    model: nn.Module, point: HookPoint, replace: Replace, batch: int | Callable[[], int], reads: Sequence[HookPoint] = ()
) -> Iterator[None]:
    """While open, the activation at `point` goes through `replace`. reads: what the coder reads where that is not `point`; the
    model must come by there first."""
    read: dict[HookPoint, Tensor] = {}

    def here(y: Tensor) -> Tensor | None:
        missing = [str(one) for one in reads if one not in read and one != point]
        if missing:
            raise UserError(f"sae: it reads {', '.join(missing)}, which comes after '{point}', and cannot steer there")
        x = torch.cat([read.get(one, y) for one in reads], dim=-1) if reads else y
        read.clear()
        return replace(x, y)

    with ExitStack() as hooks:
        for one in reads:
            if one != point:
                hooks.enter_context(hooked(model, one, partial(_keep, read, one), batch))
        hooks.enter_context(hooked(model, point, here, batch))
        yield


@torch.no_grad()
def continued(
    model: nn.Module, point: HookPoint, replace: Replace, ids: Sequence[int], count: int, device: torch.device,
    reads: Sequence[HookPoint] = (),
) -> list[int]:  # fmt: skip
    """The `count` most likely next tokens, one after the other, with the activation at `point` passed through `replace` at all
    of them. reads: what the coder reads where that is not `point`; the model must come by there first. Of two models the one
    that `point` is in is steered, and writes."""
    tokens = list(ids)
    beside = [one for one in reads if within(model, one)[0] is not within(model, point)[0]]
    for _ in range(count):
        read = capture(model, beside, {"input_ids": torch.tensor([tokens], device=device)}) if beside else {}

        def here(y: Tensor, read: dict[HookPoint, Tensor] = read) -> Tensor | None:
            missing = [str(one) for one in reads if one not in read and one != point]
            if missing:
                raise UserError(f"sae: it reads {', '.join(missing)}, which comes after '{point}', and cannot steer there")
            return replace(torch.cat([read.get(one, y) for one in reads], dim=-1) if reads else y, y)

        with ExitStack() as hooks:
            for one in reads:
                if one != point and one not in beside:
                    hooks.enter_context(hooked(model, one, partial(_keep, read, one), 1))
            logits = spliced_logits(model, point, here, torch.tensor([tokens], device=device))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(ids) :]


def _keep(read: dict[HookPoint, Tensor], point: HookPoint, activation: Tensor) -> None:
    read[point] = activation.clone()
