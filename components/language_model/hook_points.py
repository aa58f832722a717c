"""Hook points: uniform names for places in a transformer, reading activations there and splicing others in.

`resid_pre.6` is the residual stream before block 6, `resid_post.6` after it, `attn_out.6` and `mlp_out.6` what the two
sublayers of block 6 add to it, `mlp_in.6` what its MLP reads (after the norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.settings import UserError

KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_in")
_BLOCK_LISTS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "model.language_model.layers")
_ATTENTION_NAMES = ("self_attn", "attn", "attention")
_MLP_NAMES = ("mlp", "feed_forward")


@dataclass(frozen=True)
class HookPoint:
    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @property
    def reads_input(self) -> bool:
        """Whether the activation is the input of its module and not the output."""
        return self.kind in ("resid_pre", "mlp_in")


def parse_hook_point(name: str, layers: int, field: str = "activations.hook_point") -> HookPoint:
    """The hook point of that name in a model of so many layers, or a UserError that names `field`."""
    kind, _, layer = name.partition(".")
    if kind not in KINDS or not layer.isdecimal() or layer != str(int(layer)):
        raise UserError(f"{field}: '{name}' is not a hook point; write one of {', '.join(KINDS)}, a dot and a layer")
    if int(layer) >= layers:
        raise UserError(f"{field}: '{name}' asks for layer {layer}, but the model has layers 0 to {layers - 1}")
    return HookPoint(kind, int(layer))


def module_of(model: nn.Module, point: HookPoint) -> nn.Module:
    """The module whose input or output is the hook point."""
    block = _blocks(model)[point.layer]
    if point.kind in ("resid_pre", "resid_post"):
        return block
    names = _ATTENTION_NAMES if point.kind == "attn_out" else _MLP_NAMES
    for name in names:
        if hasattr(block, name):
            return getattr(block, name)
    raise UserError(f"activations.hook_point: '{point}' is not known for {type(model).__name__}")


class _Stop(Exception):
    """Raised inside the last hook: nothing after it is needed."""


@torch.no_grad()
def capture(model: nn.Module, points: Sequence[HookPoint], tokens: Tensor) -> dict[HookPoint, Tensor]:
    """The activations `[batch, length, d_in]` at each hook point; the forward pass ends at the last one.

    tokens: `[batch, length]`. Padding stands on the right, so that causal attention needs no mask.
    """
    captured: dict[HookPoint, Tensor] = {}
    remaining = set(points)

    def keep(point: HookPoint) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            captured[point] = activation
            remaining.discard(point)
            if not remaining:
                raise _Stop

        return read

    with ExitStack() as hooks:
        for point in points:
            hooks.enter_context(_hooked(model, point, keep(point)))
        with suppress(_Stop):
            model(input_ids=tokens, use_cache=False)
    return captured


@torch.no_grad()
def spliced_logits(model: nn.Module, point: HookPoint, replace: Callable[[Tensor], Tensor | None], tokens: Tensor) -> Tensor:
    """Logits `[batch, length, vocabulary]` with the activation at `point` passed through `replace`.

    `replace` gets `[batch, length, d_in]` and gives the same shape back, or None to leave it as it is.
    """
    with _hooked(model, point, replace):
        return model(input_ids=tokens, use_cache=False).logits


@contextmanager
def _hooked(model: nn.Module, point: HookPoint, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    module = module_of(model, point)
    handle = (
        module.register_forward_pre_hook(_on_input(function), with_kwargs=True)
        if point.reads_input
        else module.register_forward_hook(_on_output(function))
    )
    try:
        yield
    finally:
        handle.remove()


def _on_input(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if arguments:
            replaced = function(arguments[0])
            return None if replaced is None else ((replaced, *arguments[1:]), named)
        replaced = function(named["hidden_states"])
        return None if replaced is None else (arguments, {**named, "hidden_states": replaced})

    return hook


def _on_output(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            replaced = function(output[0])
            return None if replaced is None else (replaced, *output[1:])
        return function(output)

    return hook


def _blocks(model: nn.Module) -> nn.ModuleList:
    for path in _BLOCK_LISTS:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise UserError(
        f"language_model.name: the blocks of {type(model).__name__} are not known; they are looked for at "
        + ", ".join(_BLOCK_LISTS)
    )
