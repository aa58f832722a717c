"""What the corpus needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from components.corpus.documents import Render

Encode = Callable[[list[str]], Sequence[Sequence[int]]]
"""Texts -> token ids, without BOS and EOS."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    encode: Encode
    """Of texts as they were found: special tokens that one spells out are text."""
    bos: int
    separator: int
    encode_rendered: Encode | None = None
    """Of texts in which special tokens are tokens, such as a chat template makes; None where there are none."""
    render: Render | None = None

    def of(self, rendered: bool) -> Encode:
        return (self.encode_rendered or self.encode) if rendered else self.encode
