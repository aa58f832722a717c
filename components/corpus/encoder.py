"""What the corpus needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from components.corpus.documents import Render


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """`identity` names the tokenizer's content; `encode` gives the token ids of each text, without BOS and EOS."""

    identity: str
    encode: Callable[[list[str]], Sequence[Sequence[int]]]
    bos: int
    separator: int
    render: Render | None = None
