"""What the corpus needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from components.corpus.documents import Render


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """`encode` gives the token ids of each text, without BOS and EOS."""

    encode: Callable[[list[str]], Sequence[Sequence[int]]]
    bos: int
    separator: int
    render: Render | None = None
