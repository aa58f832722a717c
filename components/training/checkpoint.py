"""Checkpoints: one safetensors file with everything that the next step depends on, put whole or not at all.

Tensors are weights, Adam's moments and the dead-feature counters; the step and the training curves stand as JSON in
the file's header. Data order, learning rate and lambda are functions of the step, and no step draws random numbers, so
there is nothing else to save.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from components import storage
from components.sae.relu import ReLUSAE

Point = dict[str, float]
"""One point of the training curves: `tokens` and the values at it."""


@dataclass
class TrainingState:
    """What training changes from step to step."""

    sae: ReLUSAE
    optimizer: torch.optim.Adam
    silent_tokens: Tensor
    """Per feature `[d_sae]`, int64: tokens since it last fired."""
    step: int
    curves: list[Point]


def checkpoint_folder(url: str) -> str:
    return storage.join(url, "checkpoints")


def save_checkpoint(state: TrainingState, url: str) -> None:
    """Put a checkpoint of `state` under the artifact `url`, then remove the older ones."""
    tensors: dict[str, Tensor] = {"silent_tokens": state.silent_tokens}
    for name, parameter in state.sae.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"adam.{key}.{name}"] = value
    header = {"state": json.dumps({"step": state.step, "curves": state.curves})}
    content = save({key: value.cpu().contiguous() for key, value in tensors.items()}, metadata=header)
    folder = checkpoint_folder(url)
    older = storage.list_names(folder)
    name = f"step-{state.step:010d}.safetensors"
    storage.put_bytes(content, storage.join(folder, name))
    for previous in older:
        if previous != name:
            storage.delete(storage.join(folder, previous))


def restore_checkpoint(state: TrainingState, url: str) -> bool:
    """Bring `state` to the newest checkpoint under `url`; False, and nothing changed, where there is none."""
    folder = checkpoint_folder(url)
    names = storage.list_names(folder)
    if not names:
        return False
    content = storage.read_bytes(storage.join(folder, names[-1]))
    header = _header(content)
    tensors = load(content)
    with torch.no_grad():
        for name, parameter in state.sae.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            state.optimizer.state[parameter] = {
                key: tensors[f"adam.{key}.{name}"].to(parameter.device)  # fused Adam keeps `step` there too
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        state.silent_tokens.copy_(tensors["silent_tokens"])
    state.step, state.curves = header["step"], header["curves"]
    return True


def _header(content: bytes) -> Any:
    """The JSON that `save_checkpoint` put into the header (8 bytes of length, then JSON: the safetensors format)."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["state"])
