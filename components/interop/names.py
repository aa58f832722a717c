"""What SAELens calls a coder: by how its features are read, and by what it writes.

`standard`, `topk`, `jumprelu` and `gated` autoencoders and `transcoder`, `skip_transcoder`, `jumprelu_transcoder` and
`jumprelu_skip_transcoder` are its own names. `topk_transcoder`, `gated_transcoder` and the crosscoders, of which it has none,
are called likewise here; it refuses them as unknown, and takes none for something else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.sae.coder import Coder, Column

READS = ("standard", "topk", "jumprelu", "gated")
AUTOENCODER, TRANSCODER, CROSSCODER = "", "transcoder", "crosscoder"
_NAME = re.compile(r"(?:(topk|jumprelu|gated)_)?(skip_)?(transcoder|crosscoder)")


@dataclass(frozen=True)
class Kind:
    reads: str
    """One of READS."""
    writes: str = AUTOENCODER
    skip: bool = False

    def __str__(self) -> str:
        if self.writes == AUTOENCODER:
            return self.reads
        return "_".join(filter(None, ("" if self.reads == "standard" else self.reads, "skip" * self.skip, self.writes)))

    @classmethod
    def parse(cls, architecture: str) -> Kind | None:
        if architecture in READS:
            return cls(architecture)
        found = _NAME.fullmatch(architecture)
        return cls(found[1] or "standard", found[3], bool(found[2])) if found else None


def kind_of(coder: Coder) -> Kind:
    return Kind(coder.exported().architecture, written_by(coder.reads, coder.writes), coder.W_skip is not None)


def written_by(reads: Sequence[Column], writes: Sequence[Column]) -> str:
    """What a coder of these columns is called."""
    if tuple(reads) != tuple(writes):
        return TRANSCODER
    return AUTOENCODER if len(reads) == 1 else CROSSCODER


def placed(coder: Coder) -> dict[str, Any]:
    """Fields of `cfg.json` that an autoencoder has not: the width of what is written, and of each column."""
    match written_by(coder.reads, coder.writes):
        case "transcoder":
            return {"d_out": coder.d_out}
        case "crosscoder":
            return {"columns": [[column.name, column.width] for column in coder.reads]}
    return {}


def columns_of(config: dict[str, Any]) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
    """What the coder of a `cfg.json` reads and writes."""
    metadata, kind = config.get("metadata") or {}, Kind.parse(config["architecture"])
    if kind is not None and kind.writes == CROSSCODER:
        columns = tuple(Column(name, width) for name, width in config["columns"])
        return columns, columns
    read = Column(str(metadata.get("hook_name") or "activations"), config["d_in"])
    if kind is not None and kind.writes == TRANSCODER:
        return (read,), (Column(str(metadata.get("hook_name_out") or "output"), config["d_out"]),)
    return (read,), (read,)
