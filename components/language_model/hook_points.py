"""Hook points: names for places in a model, reading activations there and splicing others in.

Uniform names mean the same place in every architecture: `resid_pre.6` is the residual stream before block 6,
`resid_post.6` after it; `attn_out.6` and `mlp_out.6` (`mixer_out.6` of a state-space block) are what the sublayers of
block 6 add to it; `mlp_in.6` is what its MLP reads, after the norm. So resid_pre + attn_out + mlp_out = resid_post.
Where a norm follows the sum (BERT), `resid_*` are the block's input and output as everywhere, and
norm(norm(resid_pre + attn_out) + mlp_out) = resid_post, of which the inner term is mlp_in.
`vision.resid_post.6` is block 6 of a vision-language model's vision tower, `second.resid_post.6` block 6 of
`language_model.second`.

Any other module is named by its path, such as `model.layers.3.mlp.act_fn`: its output, or with `:in` its first input;
the first call counts where a module is called more often. `*`, `?`, `[0-3]` and `{2,4}` match within one part of a name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from components.language_model.architectures import KINDS, SECOND, TOWERS, TwoModels, blocks, sublayer, vision_tower
from components.settings import UserError


@dataclass(frozen=True)
class HookPoint:
    kind: str
    """One of KINDS; or the path of a module, with `:in` for what it reads."""

    layer: int | None = None
    """The block's number; None for a module path."""

    tower: str = ""

    def __str__(self) -> str:
        return ".".join(part for part in (self.tower, self.kind, "" if self.layer is None else str(self.layer)) if part)


class HasSkeleton(Protocol):
    """A model source, as far as hook points need one."""

    @property
    def skeleton(self) -> nn.Module: ...


def expand_hook_points(names: Sequence[str], source: HasSkeleton, field: str) -> list[HookPoint]:
    """The hook points that names and globs mean in a model, in the order of the names (of one glob, in the model's), each
    once. Raises a UserError that names `field` for a name that the model does not have."""
    model, found = source.skeleton, dict[HookPoint, None]()
    for name in names:
        if isinstance(model, TwoModels) and name.startswith(f"{SECOND}."):
            there = _expanded(name.removeprefix(f"{SECOND}."), model.second, f"{field}: {SECOND}")
            found.update(dict.fromkeys(replace(point, tower=SECOND) for point in there if not point.tower))
        else:
            found.update(dict.fromkeys(_expanded(name, model.first if isinstance(model, TwoModels) else model, field)))
    return list(found)


def _expanded(name: str, model: nn.Module, field: str) -> list[HookPoint]:
    """What one name or glob means in a model."""
    uniform = {str(point): point for point in _uniform(model)}
    paths = [path for path, _ in model.named_modules() if path]
    bare, colon, side = name.partition(":")
    pattern = _glob(bare)
    if colon == "" and (matches := [point for known, point in uniform.items() if pattern.fullmatch(known)]):
        return matches
    if side in ("", "in") and (reached := [path for path in paths if pattern.fullmatch(path)]):
        return [HookPoint(path + colon + side) for path in reached]
    raise UserError(f"{field}: '{name}' is not a hook point of {type(model).__name__}; {_hint(name, list(uniform), paths)}")


def _uniform(model: nn.Module) -> Iterator[HookPoint]:
    for tower in TOWERS:
        if tower and vision_tower(model) is None:
            continue
        try:
            _, modules = blocks(model, tower)
        except UserError:  # its blocks are not known; module paths still are
            continue
        for layer, block in enumerate(modules):
            yield from (HookPoint(kind, layer, tower) for kind in KINDS if sublayer(block, kind) is not None)


def _glob(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression in which no wildcard matches a dot."""
    parts = re.split(r"(\*|\?|\[[^\]]*\]|\{[^{}]*\})", pattern)
    meaning = {"*": "[^.]*", "?": "[^.]"}

    def translated(part: str) -> str:
        if part.startswith("["):
            return part.replace("[!", "[^")
        if part.startswith("{"):
            return "(?:" + "|".join(map(re.escape, part[1:-1].split(","))) + ")"
        return meaning.get(part, re.escape(part))

    return re.compile("".join(map(translated, parts)))


def _hint(name: str, uniform: list[str], paths: list[str]) -> str:
    points = [parse_hook_point(known) for known in uniform]
    kinds = list(dict.fromkeys(".".join(part for part in (point.tower, point.kind) if part) for point in points))
    wanted = parse_hook_point(name)
    kind = str(wanted).rpartition(".")[0]
    if wanted.layer is not None and kind in kinds:
        layers = sorted(point.layer or 0 for point in points if (point.kind, point.tower) == (wanted.kind, wanted.tower))
        return f"it has {kind} in layers {layers[0]} to {layers[-1]}"
    accepted = f"accepted are {', '.join(kinds)} with a dot and a layer, or a module path such as {paths[len(paths) // 2]}"
    close = difflib.get_close_matches(name, [*uniform, *paths], n=3)
    return f"did you mean {' or '.join(close)}? ({accepted})" if close else accepted


def parse_hook_point(name: str) -> HookPoint:
    """The hook point of that name, whether or not a model has it. No globs."""
    if name.startswith(f"{SECOND}."):
        return replace(parse_hook_point(name.removeprefix(f"{SECOND}.")), tower=SECOND)
    tower, _, rest = name.rpartition(".")[0].rpartition(".")
    kind, layer = rest, name.rpartition(".")[2]
    if kind in KINDS and tower in TOWERS and layer.isdecimal():
        return HookPoint(kind, int(layer), tower)
    return HookPoint(name)


def within(model: nn.Module, point: HookPoint) -> tuple[nn.Module, HookPoint]:
    """The one of two models that a hook point is in, and the point as that one knows it; a single model is itself."""
    if not isinstance(model, TwoModels):
        return model, point
    return (model.second, replace(point, tower="")) if point.tower == SECOND else (model.first, point)


def locate(model: nn.Module, point: HookPoint) -> tuple[nn.Module, bool]:
    """The module of the hook point, and whether it is the module's input (else its output)."""
    model, point = within(model, point)
    known = _located.setdefault(model, {})
    if point not in known:
        known[point] = _search(model, point)
    return known[point]


# Looking through the modules of a large model takes milliseconds, and every batch asks. Weak, so that a model can go.
_located: WeakKeyDictionary[nn.Module, dict[HookPoint, tuple[nn.Module, bool]]] = WeakKeyDictionary()


def _search(model: nn.Module, point: HookPoint) -> tuple[nn.Module, bool]:
    if point.layer is None:
        path, _, side = point.kind.partition(":")
        return model.get_submodule(path), side == "in"
    block = blocks(model, point.tower)[1][point.layer]
    found = sublayer(block, point.kind)
    if found is None:
        raise UserError(f"activations.hook_points: '{point}' is not known for {type(model).__name__}")
    path, reads_input = found
    return block.get_submodule(path), reads_input


def depth(model: nn.Module, point: HookPoint) -> float:
    """About which share of the blocks a forward pass runs to reach the hook point; 1 where that is not known."""
    model, point = within(model, point)
    tower, layer, before = point.tower, point.layer, point.kind == "resid_pre"
    if layer is None:
        path = blocks(model, tower)[0] + "."
        number = point.kind.removeprefix(path).partition(".")[0].partition(":")[0]
        if not point.kind.startswith(path) or not number.isdecimal():
            return 1.0
        layer = int(number)
    return (layer + (not before)) / len(blocks(model, tower)[1])


def reads_images(model: nn.Module, points: Sequence[HookPoint]) -> bool:
    """Whether the hook points are in the vision tower of a model that reads text as well, or in one that reads none.

    Raises a UserError where some are and some are not: their rows are not the same tokens.
    """
    if isinstance(model, TwoModels):
        points, model = [point for point in points if point.tower != SECOND], model.first
        if not points:
            return False
    tower = vision_tower(model)
    if tower is None:
        return "pixel_values" in str(getattr(model, "main_input_name", ""))
    path = next(name for name, module in model.named_modules() if module is tower)
    inside = {point.tower == "vision" or f"{point.kind}.".replace(":", ".").startswith(f"{path}.") for point in points}
    if len(inside) > 1:
        names = ", ".join(map(str, points))
        raise UserError(
            f"activations.hook_points: of {names}, some are in the vision tower and some are not, so they share no rows; "
            "make two datasets"
        )
    return inside == {True}


class _Stop(Exception):
    """Raised inside the last hook: nothing after it is needed."""


@torch.no_grad()
def capture(model: nn.Module, points: Sequence[HookPoint], inputs: Mapping[str, Tensor]) -> dict[HookPoint, Tensor]:
    """The activations `[batch, length, d_in]` at each hook point; the forward pass ends at the last one.

    inputs: what the model's forward takes, from `loading.forward_inputs`. A vision-language model that gets no tokens runs
    its vision tower alone. The activations are on the device of the inputs, whatever device their layer is on. Of two models
    each is run that one of the points is in.
    """
    if isinstance(model, TwoModels):
        every: dict[HookPoint, Tensor] = {}
        for one in (model.first, model.second):
            here = {inner: point for point in points for owner, inner in [within(model, point)] if owner is one}
            if here:
                every |= {here[inner]: seen for inner, seen in capture(one, list(here), inputs).items()}
        return {point: every[point] for point in points}
    captured: dict[HookPoint, Tensor] = {}
    remaining = set(points)
    first = next(iter(inputs.values()))

    def keep(point: HookPoint) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            if point not in remaining:
                return
            remaining.discard(point)
            if remaining:
                # What runs next may add to this very tensor in place, as Falcon's block does.
                activation = activation.clone()
            captured[point] = activation.to(first.device)
            if not remaining:
                raise _Stop

        return read

    runner = model if "input_ids" in inputs else vision_tower(model) or model
    with ExitStack() as hooks:
        for point in points:
            hooks.enter_context(hooked(model, point, keep(point), len(first)))
        with suppress(_Stop):
            runner(**inputs, **_without_cache(runner))
    if remaining:
        missed = min(map(str, remaining))
        raise UserError(f"activations.hook_points: the forward pass of {type(model).__name__} never reached '{missed}'")
    return captured


def capture_beside(model: nn.Module, points: Sequence[HookPoint], inputs: Mapping[str, Tensor]) -> Tensor:
    """The activations at several hook points as one, `[batch, length, d_in of all]`."""
    captured = capture(model, points, inputs)
    return captured[points[0]] if len(points) == 1 else torch.cat([captured[point] for point in points], dim=-1)


@torch.no_grad()
def spliced_logits(
    model: nn.Module,
    point: HookPoint,
    replace: Callable[[Tensor], Tensor | None],
    inputs: Tensor | Mapping[str, Tensor],
    head: nn.Module | None = None,
) -> Tensor:
    """Logits `[batch, length, vocabulary]` with the activation at `point` passed through `replace`.

    `replace` gets `[batch, length, d_in]` and gives the same shape back, or None to leave it as it is. inputs: token ids
    `[batch, length]`, or all that the model's forward takes. Of two models the one that the point is in is run. head: an image
    classifier that the model is the body of; its logits are `[batch, 1, classes]`.
    """
    model, point = within(model, point)
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    with hooked(model, point, replace, len(next(iter(given.values())))):
        return model(**given, use_cache=False).logits if head is None else head(**given).logits[:, None]


def logits_gradient(
    model: nn.Module,
    point: HookPoint,
    tokens: Tensor,
    metric: Callable[[Tensor], Tensor],
    less: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The activation at `point` and the gradient there of a scalar `metric` of the logits, both `[batch, length, d_in]`; with
    `less` of that shape taken away before."""
    kept: list[Tensor] = []
    model, point = within(model, point)

    def leaf(activation: Tensor) -> Tensor:
        changed = activation if less is None else (activation.to(less.dtype) - less).to(activation.dtype)
        kept.append(changed.detach().requires_grad_())
        return kept[-1]

    with torch.enable_grad(), hooked(model, point, leaf, len(tokens)):
        value = metric(model(input_ids=tokens, use_cache=False).logits)
        (gradient,) = torch.autograd.grad(value, kept[-1])
    return kept[-1].detach(), gradient


def _without_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) is not None else {}


@contextmanager
def hooked(
    model: nn.Module, point: HookPoint, function: Callable[[Tensor], Tensor | None], batch: int | Callable[[], int]
) -> Iterator[None]:
    """While open, the activation at `point`, `[batch, length, d_in]`, goes through `function`, which gives another, or None to
    leave it. batch: how many sequences a forward pass has; or what says so of the one that runs."""
    module, reads_input = locate(model, point)

    def shaped(activation: Any) -> Any:
        if not isinstance(activation, Tensor):
            raise UserError(f"activations.hook_points: '{point}' is no tensor but a {type(activation).__name__}")
        # OPT's MLP works on `[batch * length, d]`.
        size = batch if isinstance(batch, int) else batch()
        rows = activation.unflatten(0, (size, -1)) if activation.ndim == 2 and len(activation) != size else activation
        if rows.ndim != 3 or len(rows) != size:
            raise UserError(
                f"activations.hook_points: '{point}' has the shape {list(activation.shape)} for a batch of {size}; "
                "accepted are places with [batch, length, d_in]"
            )
        replaced = function(rows)
        return None if replaced is None else replaced.view_as(activation)

    handle = (
        module.register_forward_pre_hook(_on_input(shaped), with_kwargs=True)
        if reads_input
        else module.register_forward_hook(_on_output(shaped))
    )
    try:
        yield
    finally:
        handle.remove()


def _on_input(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if arguments:
            replaced = function(arguments[0])
            return None if replaced is None else ((replaced, *arguments[1:]), named)
        name = "hidden_states" if "hidden_states" in named else next(iter(named))
        replaced = function(named[name])
        return None if replaced is None else (arguments, {**named, name: replaced})

    return hook


def _on_output(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            replaced = function(output[0])
            return None if replaced is None else (replaced, *output[1:])
        return function(output)

    return hook
