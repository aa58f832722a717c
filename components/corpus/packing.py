"""Documents in, fixed-length sequences out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.corpus.settings import CorpusSettings

SPECIAL = -1
"""Document id of a BOS token or of a separator between documents: attended to, never counted."""
PADDING = -2
"""Document id of padding: neither attended to nor counted."""


class Packer:
    """Packs documents into sequences; keeps less than one sequence between calls.

    `crossing`: documents follow each other with the separator (EOS) after each, and are cut wherever a sequence ends.
    `within_document`: a document fills as many sequences as it needs, the last one padded.
    """

    def __init__(self, settings: CorpusSettings, bos: int, separator: int) -> None:
        self.crossing = settings.packing == "crossing"
        self.start = [bos] if settings.bos == "sequence" else []
        # Before each document; where one token is both, it stands between two documents once and not twice.
        self.before = [bos] if settings.bos == "document" else []
        self.after = [separator] if self.crossing and self.before != [separator] else []
        self.padding = separator
        self.length = settings.context_length - len(self.start)
        self.counted = 0
        self._rest = np.empty((3, 0), dtype=np.int64)  # rows: token, document, position

    def add(self, document: int, tokens: Sequence[int]) -> np.ndarray:
        """`[n, 3, context_length]` of the sequences that this document completes."""
        self.counted += len(tokens)
        body = np.stack([np.array(tokens, dtype=np.int64), np.full(len(tokens), document), np.arange(len(tokens))])
        stream = np.concatenate([self._rest, _special(self.before), body, _special(self.after)], axis=1)
        if not self.crossing:
            stream = self._padded(stream)
        full = stream.shape[1] // self.length * self.length
        self._rest = stream[:, full:]
        return self._framed(stream[:, :full])

    def finish(self) -> np.ndarray:
        """The last, padded sequence, if anything is left."""
        return self._framed(self._padded(self._rest))

    def _padded(self, stream: np.ndarray) -> np.ndarray:
        missing = -stream.shape[1] % self.length
        pad = np.array([[self.padding], [PADDING], [0]]).repeat(missing, axis=1)
        return np.concatenate([stream, pad], axis=1)

    def _framed(self, stream: np.ndarray) -> np.ndarray:
        """Cut, without the sequences in which nothing is counted, and with what stands at the start of each."""
        rows = stream.reshape(3, -1, self.length).transpose(1, 0, 2)
        rows = rows[(rows[:, 1] >= 0).any(axis=1)]
        start = _special(self.start)
        return np.concatenate([np.broadcast_to(start, (len(rows), *start.shape)), rows], axis=2)


def _special(tokens: list[int]) -> np.ndarray:
    return np.array([tokens, [SPECIAL] * len(tokens), [0] * len(tokens)], dtype=np.int64)
