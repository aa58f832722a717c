"""Classes of tokens by their text, so that one sees where an SAE does well: on words, inside them, on punctuation ..."""

from __future__ import annotations

from typing import Any

import numpy as np

CLASSES = ("word start", "word continuation", "number", "punctuation", "whitespace", "other")
"""`other` is what has no text of its own: parts of a character, special tokens."""
_WORD, _CONTINUATION = 0, 1
_SPACE_MARKS = ("Ġ", "▁")  # of byte-level BPE and SentencePiece, whose decoders drop the space of a single token


class TokenClasses:
    """The class of each token of a sequence; the text of a token is looked up when it is first met."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._class = np.full(0, -1, dtype=np.int64)
        self._ends_in_word = np.zeros(0, dtype=bool)
        self._opens_word = np.zeros(0, dtype=bool)

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """tokens `[n, length]` -> indices into `CLASSES`, the same shape.

        A piece of a word is its start where it brings a space along, or follows something that is no letter or digit.
        """
        self._learn(np.unique(tokens))
        classes = self._class[tokens]
        inside = np.zeros_like(tokens, dtype=bool)
        inside[:, 1:] = self._ends_in_word[tokens[:, :-1]]
        continues = (classes == _WORD) & inside & ~self._opens_word[tokens]
        return np.where(continues, _CONTINUATION, classes)

    def _learn(self, ids: np.ndarray) -> None:
        missing = int(ids.max()) + 1 - len(self._class)
        if missing > 0:
            self._class = np.pad(self._class, (0, missing), constant_values=-1)
            self._ends_in_word = np.pad(self._ends_in_word, (0, missing))
            self._opens_word = np.pad(self._opens_word, (0, missing))
        new = ids[self._class[ids] < 0].tolist()
        special = set(getattr(self._tokenizer, "all_special_ids", ()))
        for token, piece in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            text = self._tokenizer.decode([token])
            self._class[token] = CLASSES.index("other") if token in special else _class_of(text)
            self._ends_in_word[token] = text[-1:].isalnum() or text[-1:] == "_"
            self._opens_word[token] = text[:1].isspace() or str(piece).startswith(_SPACE_MARKS)


def _class_of(text: str) -> int:
    """The class of one token's text; any piece of a word is taken for its start here."""
    body = text.strip()
    if not text or "\ufffd" in text:
        name = "other"
    elif not body:
        name = "whitespace"
    elif any(character.isalpha() for character in body):
        name = "word start"
    elif any(character.isnumeric() for character in body):
        name = "number"
    else:
        name = "punctuation"
    return CLASSES.index(name)
