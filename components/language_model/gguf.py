"""Models in GGUF files: dequantised once, to a folder in transformers' format that the rest of the project reads."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from components.settings import UserError, first_line
from components.storage import exclusive, file_sha256, free_bytes

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
_RECIPE = 1
"""Raised when a file is converted to something else than before."""
_MAGIC = b"GGUF"
_MODEL, _SPLIT = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_LIKE_GPT2 = ("gpt-2", "phi-2", "default")
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""llama.cpp's names of byte-level tokenizers that split text as GPT-2's does, and of those that take every digit apart
before; transformers (5.23) treats the second kind as the first, and gives other tokens for whitespace before a number."""


def models_folder() -> Path:
    """Where models that were converted or fetched are kept: under the user's cache, for every checkout and root."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae-foundry" / "models"


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a local name means: itself, or the only one of a folder without a `config.json`; else None."""
    path = Path(name)
    if path.suffix.lower() == SUFFIX:
        if not os.path.isfile(name):  # which takes a name that is too long for a no
            raise UserError(f"language_model.name: there is no file '{name}'")
        return path
    if not os.path.isdir(name) or (path / "config.json").exists():
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if len(found) > 1:
        raise UserError(
            f"language_model.name: '{name}' holds {len(found)} GGUF files, such as {found[0].name}; name the one that is meant"
        )
    return found[0] if found else None


def converted(file: Path) -> Path:
    """The folder that a GGUF file was converted to, by its content; made where it is not there yet."""
    folder = models_folder() / f"gguf-{file_sha256(file)[:16]}-{_RECIPE}"
    with whole_folder(folder) as staged:
        if staged is not None:
            convert(file, staged)
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path | None]:
    """A folder to fill, which then appears whole as `folder`; None where that is there. One process at a time."""
    if folder.is_dir():
        yield None
        return
    with exclusive(str(folder)):
        if folder.is_dir():
            yield None
            return
        staged = folder.parent / f".staged-{folder.name}"
        shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed: nobody else is here
        staged.mkdir()
        try:
            yield staged
            staged.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model, its weights dequantised to float32, and its tokenizer in transformers' format.

    Files of a tokenizer that lie beside it count more than what the GGUF says of it. A UserError for what transformers does
    not read.
    """
    from transformers.utils import logging as transformers_logging

    metadata, kinds, parameters = _header(file)
    needed, free = 4 * parameters, free_bytes(str(folder.parent))
    quantized = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    logger.warning(
        "%s is dequantised to float32, %.1f GB, in %s: the model is the quantised one (tensors: %s), not the one that it was "
        "made of",
        file.name, needed / 1e9, folder.parent, quantized,
    )  # fmt: skip
    if free is not None and needed > free:
        raise UserError(
            f"language_model.name: '{file}' takes {needed / 1e9:,.1f} GB dequantised, and the disk of {folder.parent} has "
            f"{free / 1e9:,.1f} GB left; XDG_CACHE_HOME names another place"
        )
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = _tokenizer(file, metadata)
        model = _dequantised(file)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in whatever way the library happens to fail on it
        raise UserError(
            f"language_model.name: '{file}' is no GGUF file that transformers reads: {first_line(error)}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # A release of transformers writes its number into it, and it is part of the model's identity.
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("transformers_version", "_model_name_or_path")}
    (folder / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _header(file: Path) -> tuple[dict[str, Any], Counter[str], int]:
    """What a file says of itself, numbers of tensors by kind of quantisation, and the number of parameters."""
    from gguf import GGUFReader

    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"language_model.name: '{file}' does not begin as a GGUF file does; copy it again")
    try:
        reader = GGUFReader(file)
        metadata = {name: reader.fields[name].contents() for name in (_MODEL, _SPLIT) if name in reader.fields}
    except Exception as error:  # a damaged file fails in whatever way the library happens to fail on it
        raise UserError(f"language_model.name: '{file}' is damaged or cut off ({first_line(error)}); copy it again") from error
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return metadata, Counter(tensor.tensor_type.name for tensor in reader.tensors), parameters


def _dequantised(file: Path) -> Any:
    """A plain model with the file's weights: what transformers loads from GGUF refuses to be saved."""
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded, found = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if found["missing_keys"]:
        raise UserError(
            f"language_model.name: '{file}' lacks {len(found['missing_keys'])} tensors of {type(loaded).__name__}, such as "
            f"{min(found['missing_keys'])}"
        )
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    return fresh


def _tokenizer(file: Path, metadata: dict[str, Any]) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if (file.parent / "tokenizer.json").is_file() or (file.parent / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(file.parent)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    split = metadata.get(_SPLIT, "default")
    if metadata.get(_MODEL) != "gpt2" or split in GGUF_PRE_TOKENIZER_SPLITS or split in _LIKE_GPT2:
        return tokenizer
    if split not in _DIGITS_APART:
        raise UserError(
            f"language_model.name: '{file}' splits text as '{split}', which is not known here; put the model's tokenizer.json "
            "beside the file"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return tokenizer
