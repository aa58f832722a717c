"""Load a model, and make its inputs."""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from components.corpus.tokens import PADDING, Sequences
from components.language_model.architectures import TwoModels, model_class
from components.language_model.source import ModelSource, find_model, second_model
from components.language_model.tokenizer import load_encoder, load_tokenizer
from components.language_model.vision import pixel_values
from components.language_model.weights import require_layers
from components.settings import UserError, first_line

__all__ = [
    "ModelSource", "find_model", "forward_inputs", "kept_model", "load_encoder", "load_model", "load_tokenizer",
    "require_runnable",
]  # fmt: skip


def require_runnable(source: ModelSource, device: torch.device) -> None:
    """Raise a UserError for a way to run the model that this machine does not have."""
    if source.second is not None:
        with second_model():
            require_runnable(source.second, device)
    settings = source.settings
    if settings.quantization is not None:
        if device.type != "cuda":
            raise UserError(
                f"language_model.quantization: '{settings.quantization}' needs a CUDA GPU, and device is '{device}'"
            )
        if find_spec("bitsandbytes") is None:
            raise UserError(
                f"language_model.quantization: '{settings.quantization}' needs the package bitsandbytes; "
                "install it, such as with `pip install bitsandbytes`, or leave the field out"
            )
    chosen = settings.attention_implementation
    if chosen is not None:
        try:
            with torch.device("meta"):
                model_class(source.config).from_config(deepcopy(source.config), **source.class_options)
        except (ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"language_model.attention_implementation: '{chosen}' does not work for '{settings.name}' here: {reason}"
            ) from error


LOADING = threading.RLock()
"""Held while transformers loads a model, in which it changes torch's default type and other state of the process: of two
threads that loaded at once, one missed tensors, and so did every later load."""


def load_model(source: ModelSource, device: torch.device) -> torch.nn.Module:
    """The model, in evaluation mode and without gradients: on `device`, or with `device_map` on all there are."""
    if source.second is not None:
        first = load_model(source.alone, device)
        with second_model():
            return TwoModels(first, load_model(source.second, device)).eval()
    from transformers.utils import logging as transformers_logging

    require_runnable(source, device)
    transformers_logging.disable_progress_bar()
    settings, options = source.settings, source.class_options
    if settings.quantization is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if settings.device_map is not None or settings.quantization is not None:
        options["device_map"] = settings.device_map or {"": str(device)}
    with LOADING:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # a table of the weights that are not needed, such as an encoder's head
        try:
            model, loaded = model_class(source.config, source.with_head).from_pretrained(
                source.location,
                config=deepcopy(source.config),
                revision=source.commit,
                dtype=getattr(torch, settings.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # a damaged file fails in whatever way the library happens to fail on it
            reason = first_line(error)
            raise UserError(f"language_model.name: '{settings.name}' has no usable safetensors weights: {reason}") from error
        finally:
            transformers_logging.set_verbosity(verbosity)
    # Encoders are loaded without the head they were trained with, some of which have a pooler that no hook point needs.
    missing = [name for name in loaded["missing_keys"] if not name.startswith(("pooler.", "head."))]
    if missing:
        raise UserError(
            f"language_model.name: the weights of '{settings.name}' lack {len(missing)} tensors of "
            f"{type(model).__name__}, such as {min(missing)}"
        )
    places = set(model.state_dict())
    require_layers(set(loaded["unexpected_keys"]), places, f"config.json of '{settings.name}' has no place for")
    model = model if "device_map" in options else model.to(device)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Kept:
    key: str
    model: torch.nn.Module
    of_threads: WeakKeyDictionary[threading.Thread, torch.nn.Module] = field(default_factory=WeakKeyDictionary)


_kept: _Kept | None = None


def kept_model(source: ModelSource, device: torch.device) -> torch.nn.Module:
    """As `load_model`, which is asked only where the last one was another model or on another device: passes, chunks and
    spans of one process share its tensors.

    Each thread has modules of its own: a hook that one thread puts on them is not called in another's forward pass.
    """
    global _kept
    key = f"{source.settings.model_dump_json()} {source.location} {source.commit} {device} {source.with_head}"
    with LOADING:
        if _kept is None or _kept.key != key:
            _kept = None  # two would not fit
            _kept = _Kept(key, load_model(source, device))
        thread = threading.current_thread()
        if thread not in _kept.of_threads:
            shared = {id(tensor): tensor for tensor in chain(_kept.model.parameters(), _kept.model.buffers())}
            _kept.of_threads[thread] = deepcopy(_kept.model, dict(shared))
        return _kept.of_threads[thread]


def forward_inputs(source: ModelSource, sequences: Sequences, device: torch.device) -> dict[str, Tensor]:
    """What the model's forward takes for a block of sequences.

    `input_ids` `[n, length]`; `attention_mask` for an encoder whose rows have padding (causal attention needs none, as
    padding stands on the right); `pixel_values` for images, alone where there are no tokens.
    """
    inputs: dict[str, Tensor] = {}
    if sequences.images is None or (sequences.tokens >= 0).all():
        inputs["input_ids"] = torch.tensor(sequences.tokens).long()
    if source.family == "encoder" and (sequences.documents == PADDING).any():
        inputs["attention_mask"] = torch.tensor(sequences.documents != PADDING).long()
    if sequences.images is not None:
        pixels = pixel_values(source.image_processor, sequences.images)
        inputs["pixel_values"] = pixels.to(getattr(torch, source.settings.dtype))
        if "input_ids" in inputs and "token_type_ids" in source.processor.model_input_names:
            # Gemma 3 lets the tokens of one image see each other.
            kinds = source.processor.create_mm_token_type_ids(sequences.tokens.tolist())
            inputs["token_type_ids"] = torch.tensor(kinds)
    return {name: value.to(device) for name, value in inputs.items()}
