"""Logits of a batch as it is and with other activations at a hook point, without running twice what lies below it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from components.language_model.hook_points import HookPoint, capture, hooked, locate, spliced_logits, within

logger = logging.getLogger(__name__)

_MLP_OUTPUT_NAMES = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "proj_down")


class Splicer:
    """`clean` runs a batch once; `spliced` then continues it from the hook point on with other activations.

    The blocks below the hook point are not run again: while a spliced batch goes through the model they hand on the
    residual stream that the clean pass left behind. Everything else (masks, rotary embeddings, head) is the model's own.
    A model that carries more than the residual stream from block to block (shared keys and values, say) is found out on
    the first batch and run in full.
    """

    def __init__(
        self,
        model: nn.Module,
        point: HookPoint,
        reads: Sequence[HookPoint] = (),
        keep_neurons: bool = False,
        to_logits: bool = True,
        head: nn.Module | None = None,
    ) -> None:
        """reads: other places whose activations a clean pass keeps in `read`. keep_neurons: also keep what the MLP's last
        matrix reads, for `mlp_out` alone. to_logits: whether the model has logits; else nothing is continued. head: see
        `spliced_logits`."""
        self.head = head
        self.model, self.point, self.reads, self.to_logits = model, point, tuple(reads), to_logits
        self._own, inner = within(model, point)
        """Of two models, the one that is continued; the other is run for what is read there."""
        self._beside = [one for one in self.reads if within(model, one)[0] is not self._own]
        self.read: dict[HookPoint, Tensor] = {}
        """Activations `[batch, length, d]` of the last clean pass at `reads`."""
        self.neurons: Tensor | None = None
        """MLP neurons `[batch, length, d_mlp]` of the last clean pass."""
        self.neuron_output = mlp_output(model, point) if keep_neurons else None
        # The first block that a spliced batch has to go through; all of them where the hook point is in no known block.
        self._first = 0 if inner.layer is None else inner.layer + (inner.kind == "resid_post")
        self._checked = False
        self._inputs: Mapping[str, Tensor]
        self._stream: Tensor
        self._in_tuple = False

    @torch.no_grad()
    def clean(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """inputs: what the model's forward takes, token ids `[batch, length]` padded on the right -> activations
        `[batch, length, d_in]` at the hook point and logits `[batch, length, vocabulary]`, None where it has none."""
        if not self.to_logits:
            with self._watching(len(next(iter(inputs.values()))), ()):
                seen_there = capture(self.model, list(dict.fromkeys([self.point, *self.reads])), inputs)
            self.read = {point: seen_there[point] for point in self.reads}
            return seen_there[self.point], None
        seen: list[Tensor] = []
        own = [one for one in self.reads if one not in self._beside]
        with self._watching(len(next(iter(inputs.values()))), own):
            logits = spliced_logits(self.model, self.point, seen.append, inputs, self.head)
        if self._beside:
            self.read |= capture(self.model, self._beside, inputs)
        self._inputs = inputs
        if not self._checked:
            self._check(seen[0], logits)
        return seen[0], logits

    @torch.no_grad()
    def spliced(self, activations: Tensor) -> Tensor:
        """activations `[variants, batch, length, d_in]` in place of those of the last clean pass -> logits
        `[variants, batch, length, vocabulary]`, computed as one larger batch."""
        variants, batch = activations.shape[:2]
        return self._continued(activations.flatten(0, 1), variants, slice(None)).unflatten(0, (variants, batch))

    def _continued(self, activations: Tensor, variants: int, rows: slice) -> Tensor:
        stream = activations
        if self.point.kind not in ("resid_pre", "resid_post") and self._first > 0:
            stream = self._stream[rows].repeat(variants, 1, 1)
        with self._handing_on(stream):
            inputs = {name: given[rows].repeat(variants, *[1] * (given.ndim - 1)) for name, given in self._inputs.items()}
            return spliced_logits(self.model, self.point, lambda _: activations, inputs, self.head)

    def _check(self, x: Tensor, logits: Tensor) -> None:
        """One sequence continued with its own activations must give its own logits."""
        self._checked = True
        if self._first == 0:
            return
        one = slice(0, 1)
        try:
            again = self._continued(x[one], 1, one)
            same = bool((again - logits[one]).abs().amax() <= 1e-2 * logits[one].abs().amax())
        except (RuntimeError, TypeError, AttributeError, KeyError, IndexError):
            same = False
        if not same:
            logger.warning("evaluate: %s cannot be continued from a block; it is run in full", type(self._own).__name__)
            self._first = 0

    @contextmanager
    def _watching(self, batch: int, reads: Sequence[HookPoint]) -> Iterator[None]:
        """While open, a clean pass leaves behind the stream that enters the first block to be run again, what is read at
        `reads`, and neurons."""
        handles = []
        if self._first > 0 and self.to_logits:
            handles.append(self._block(self._first - 1).register_forward_hook(self._keep_stream))
        if self.neuron_output is not None:
            handles.append(self.neuron_output.register_forward_pre_hook(self._keep_neurons))
        try:
            with ExitStack() as hooks:
                for point in reads:
                    hooks.enter_context(hooked(self.model, point, partial(self._keep_read, point), batch))
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep_read(self, point: HookPoint, activation: Tensor) -> None:
        self.read[point] = activation.clone()  # what runs next may add to this very tensor in place

    def _keep_stream(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        self._in_tuple = isinstance(output, tuple)
        self._stream = output[0] if self._in_tuple else output

    def _keep_neurons(self, _module: nn.Module, arguments: Any) -> None:
        self.neurons = arguments[0]

    @contextmanager
    def _handing_on(self, stream: Tensor) -> Iterator[None]:
        """While open, every block below the first to be run again gives `stream` and computes nothing."""
        blocks = [self._block(layer) for layer in range(self._first)]
        own = [block.__dict__.get("forward") for block in blocks]
        result = (stream, None) if self._in_tuple else stream
        for block in blocks:
            block.forward = lambda *_, **__: result
        try:
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                del block.__dict__["forward"]
                if forward is not None:
                    block.forward = forward

    def _block(self, layer: int) -> nn.Module:
        return locate(self._own, HookPoint("resid_post", layer))[0]


def mlp_output(model: nn.Module, point: HookPoint) -> nn.Module | None:
    """The matrix that turns the MLP's neurons into `mlp_out`, None at other hook points or where its name is not known."""
    if point.kind != "mlp_out":
        return None
    mlp, _ = locate(model, point)
    return next((getattr(mlp, name) for name in _MLP_OUTPUT_NAMES if hasattr(mlp, name)), None)
