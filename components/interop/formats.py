"""The formats in which SAEs come and go, each recognised by the files of its folder.

| format | files | read | written |
|---|---|---|---|
| SAELens 6 | `cfg.json`, `sae_weights.safetensors` | standard, topk, jumprelu, gated | yes |
| sparsify | `cfg.json`, `sae.safetensors` | topk | topk |
| dictionary_learning | `config.json`, `ae.pt` | all seven classes | no |
| Gemma Scope | `params.npz` | jumprelu | no |
| Gemma Scope 2 | `config.json`, `params.safetensors` | jumprelu, transcoders | no |
| circuit-tracer | `config.yaml`, `layer_N.safetensors` | transcoders of one layer | ReLU, JumpReLU |

Transcoders are read and written in SAELens' format too, and sparsify's of TopK.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.interop import circuit_tracer, dictionary_learning, gemma_scope, saelens, sparsify
from components.interop.coders import AnySAE, coder_of


@dataclass(frozen=True)
class Format:
    name: str
    files: tuple[str, ...]
    """Of a folder, which decide together what the SAE computes."""
    numbered: re.Pattern[str] | None
    """Of another, with a number in its name."""
    config: Callable[[Path, str], dict[str, Any]]
    """Folder, and the address from which it was copied -> what the SAE is, in terms of SAELens' `cfg.json`."""
    tensors: Callable[[Path, dict[str, Any]], dict[str, Tensor]]
    """Folder and configuration -> tensors under SAELens' names."""

    def of(self, names: Collection[str]) -> tuple[str, ...] | None:
        """The files of this format among these, None where one is missing."""
        numbered = sorted(name for name in names if self.numbered is not None and self.numbered.fullmatch(name))
        complete = {*self.files} <= {*names} and (self.numbered is None or numbered)
        return (*self.files, *numbered) if complete else None


FORMATS = (
    Format("SAELens", (saelens.CONFIG_NAME, saelens.WEIGHTS_NAME), None, saelens.read_config, saelens.read_tensors),
    Format("sparsify", (sparsify.CONFIG_NAME, sparsify.WEIGHTS_NAME), None, sparsify.read_config, sparsify.read_tensors),
    Format(
        "dictionary_learning",
        (dictionary_learning.CONFIG_NAME, dictionary_learning.WEIGHTS_NAME),
        None,
        dictionary_learning.read_config,
        dictionary_learning.read_tensors,
    ),
    Format("Gemma Scope", (gemma_scope.NPZ_NAME,), None, gemma_scope.read_npz_config, gemma_scope.read_npz_tensors),
    Format(
        "Gemma Scope 2",
        (gemma_scope.CONFIG_NAME, gemma_scope.WEIGHTS_NAME),
        None,
        gemma_scope.read_config,
        gemma_scope.read_tensors,
    ),
    Format(
        "circuit-tracer",
        (circuit_tracer.CONFIG_NAME,),
        circuit_tracer.LAYER,
        circuit_tracer.read_config,
        circuit_tracer.read_tensors,
    ),
)
WRITERS: dict[str, Callable[[AnySAE, dict[str, Any]], dict[str, bytes]]] = {
    "saelens": saelens.saelens_files,
    "sparsify": sparsify.sparsify_files,
    "circuit-tracer": circuit_tracer.circuit_tracer_files,
}
_CROSS_LAYER = re.compile(r"(W_enc|W_dec)_\d+\.safetensors")


@dataclass(frozen=True)
class GivenSAE:
    """An SAE in a local folder, of which the configuration has been read and accepted, and the tensors not yet."""

    folder: Path
    format: Format
    config: dict[str, Any]
    files: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        return {key: value for key, value in (self.config.get("metadata") or {}).items() if value is not None}

    def content_digest(self) -> str:
        """SHA-256 over the files, which together decide what the SAE computes."""
        parts = [sha256((self.folder / name).read_bytes()).hexdigest() for name in self.files]
        return sha256(" ".join(parts).encode()).hexdigest()

    def load(self, device: torch.device, mean_norm: float | None = None) -> AnySAE:
        """For use and not for training; a ValueError for anything that cannot be run as its own library would. mean_norm: see
        `coders.coder_of`."""
        tensors = self.format.tensors(self.folder, self.config)
        try:
            return coder_of(self.config, tensors, device, mean_norm)
        except ValueError as error:
            raise ValueError(f"{self.folder / self.files[-1]}: {error}") from error


def format_of(names: Collection[str], address: str) -> Format:
    """The format of a folder with files of these names; a ValueError in one sentence unless it is exactly one."""
    found = [candidate for candidate in FORMATS if candidate.of(names)]
    if len(found) == 1:
        return found[0]
    if not found and any(_CROSS_LAYER.fullmatch(name) for name in names):
        raise ValueError(f"'{address}' is circuit-tracer's cross-layer transcoder; accepted are transcoders of one layer")
    what = f"files of {' and '.join(candidate.name for candidate in found)}" if found else "no SAE"
    names_of = {one.name: [*one.files, *(["layer_N.safetensors"] if one.numbered else [])] for one in FORMATS}
    every = [f"{' and '.join(files)} ({name})" for name, files in names_of.items()]
    raise ValueError(f"'{address}' holds {what}; accepted is a folder with one of: {'; '.join(every)}")


def given_sae(folder: Path, address: str) -> GivenSAE:
    """The SAE in a local folder. address: from which it was copied, since some formats say there where they belong."""
    names = [path.name for path in folder.iterdir()]
    known = format_of(names, address)
    config, files = known.config(folder, address), known.of(names) or ()
    options = (config.get("metadata") or {}).get("model_from_pretrained_kwargs")
    if not isinstance(options, dict | None):
        raise ValueError(f"'{address}': model_from_pretrained_kwargs is {options!r}; a mapping is accepted")
    return GivenSAE(folder, known, config, files)
