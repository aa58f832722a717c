"""The weights in a model's folder, looked at before anything else begins: whole files of tensors that fit the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from components.language_model.source import ModelSource
from components.records import json_object
from components.settings import UserError

_ALONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"


def require_weights(source: ModelSource) -> None:
    """Raise a UserError for a local folder whose weights cannot be loaded: none, pointers, damaged ones, or of other shapes.

    Headers are read and nothing else. What is on the Hub is looked at when it is loaded, and so are adapters.
    """
    folder, name = Path(source.location), source.settings.name
    if source.commit is not None or not folder.is_dir() or (folder / "adapter_config.json").exists():
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder, name):
        shapes |= _shapes(path, name)
    if getattr(source.config, "quantization_config", None) is not None or _converted(source):
        return
    wanted = {key: tuple(tensor.shape) for key, tensor in source.skeleton.state_dict().items()}
    for key in sorted(set(shapes) & set(wanted)):
        if shapes[key] != wanted[key]:
            raise UserError(
                f"language_model.name: {key} in the weights of '{name}' is {list(shapes[key])}, and by its config.json "
                f"{list(wanted[key])}; one of the two is another model's"
            )
    ignored: Any = getattr(source.skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = {key for key in set(shapes) - set(wanted) if not any(re.search(pattern, key) for pattern in ignored)}
    require_layers(left, set(wanted), f"config.json of '{name}' has no place for")
    require_layers(set(wanted) - set(shapes), set(shapes), f"the weights of '{name}' lack")


def require_layers(missing: set[str], known: set[str], what: str) -> None:
    """Raise a UserError for tensors that are missing where others of the same kind are known: another number of layers."""
    kinds = {_kind(key) for key in known}
    layers = sorted(key for key in missing if _kind(key) in kinds)
    if layers:
        raise UserError(f"language_model.name: {what} {len(layers)} tensors, such as {layers[0]}")


def _files(folder: Path, name: str) -> list[Path]:
    if (folder / _ALONE).exists():
        return [folder / _ALONE]
    if not (folder / _INDEX).exists():
        raise UserError(f"language_model.name: '{name}' has no usable safetensors weights: neither {_ALONE} nor {_INDEX}")
    listed = json_object(folder / _INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"language_model.name: {_INDEX} of '{name}' is damaged: it lists no tensors by file")
    paths = [folder / file for file in sorted(set(listed.values()))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"language_model.name: '{name}' lacks {path.name}, which {_INDEX} names; copy the whole folder")
    return paths


def _shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file, whose header says of every byte what it is."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"language_model.name: {path.name} of '{name}' is a pointer of Git LFS and not the file; run `git lfs pull`"
                )
        with safe_open(path, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"language_model.name: {path.name} of '{name}' is damaged or cut off ({error}); copy it again"
        ) from error


def _converted(source: ModelSource) -> bool:
    """Whether transformers makes other tensors of those in the files, as of experts that it joins."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kinds = {str(getattr(config, "model_type", "")) for config in (source.config, source.config.get_text_config())}
    return any(get_checkpoint_conversion_mapping(kind) for kind in kinds)


def _kind(key: str) -> str:
    """The name of a tensor, whatever its layer."""
    return ".".join("#" if part.isdecimal() else part for part in key.split("."))
